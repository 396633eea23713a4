#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in one command of at most nine minutes:
#
#   build      the extension for this card, in place, with what is installed: nothing is fetched
#   tests      the tests that take a device, on the GPU: every kernel against the reference, and tests/test_cuda.py
#   sanitizer  small calls of every kernel under each tool of compute-sanitizer, if there is one
#   wrappers   single instructions and tile functions: the GPU and the emulator beside plain torch
#   bench      attention forward, backward and decoding beside other packages; qk_norm_rotary
#   host       the other tests, which need no GPU but meet other versions here; in the time that is left
#
#   tests/gpu.sh [--only build,tests,...] [--list]
#
# A step that fails does not stop the later ones; one that ends early leaves its time to them. A table comes last. The
# exit code is 0 if every step passed. From the environment:
#
#   OUT                   folder for a log of each step and gpu.json (default: benchmarks/results)
#   BUDGET                seconds for all of it (540)
#   PYTHON                the interpreter with torch (python3)
#   WHEELS                a folder of wheels that are missing here, hypothesis for instance; installed beside, not into
#   TORCH_CUDA_ARCH_LIST  default: this card's alone; set to nothing: the list of CMakeLists.txt
#   COMMIT                what to record where there is no git
#
# shellcheck disable=SC2329  # the steps are called by name
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

STEPS=(build tests sanitizer wrappers bench host)
declare -A ALLOWANCE=([build]=150 [tests]=130 [sanitizer]=60 [wrappers]=60 [bench]=130 [host]=10) # seconds
DEVICE_TESTS=(tests/test_attention.py tests/test_qk_norm_rotary.py tests/test_token_shift_norm.py)
NOT_RUN=77 # exit code of a step that cannot run here; the last line of its log says why

usage() { sed -n '2,/^# shellcheck/{/^# shellcheck/d; s/^# \{0,1\}//; p}' "${BASH_SOURCE[0]}"; }

only=${STEPS[*]}
inside="" # the step that this process is
while (($#)); do
  case $1 in
    --only)
      only=${2:?--only needs a list of steps}
      only=${only//,/ }
      shift
      ;;
    --only=*)
      only=${1#--only=}
      only=${only//,/ }
      ;;
    --inside)
      inside=$2
      shift
      ;;
    --list)
      printf '%s\n' "${STEPS[@]}"
      exit
      ;;
    -h | --help)
      usage
      exit
      ;;
    *)
      echo "gpu.sh: unknown argument '$1'; known are --only STEPS, --list, --help" >&2
      exit 2
      ;;
  esac
  shift
done
for name in $only; do
  if [[ " ${STEPS[*]} " != *" $name "* ]]; then
    echo "gpu.sh: --only knows ${STEPS[*]}, got '$name'" >&2
    exit 2
  fi
done

# ---- the steps: each is this script again, under `timeout`, with --inside -------------------------------------------

run_build() {
  if [[ -z ${TORCH_CUDA_ARCH_LIST+set} ]]; then
    # Hopper's own instructions need the name that no other chip answers to.
    TORCH_CUDA_ARCH_LIST=$("$PYTHON" -c '
import torch
major, minor = torch.cuda.get_device_capability()
print(f"{major}.{minor}" + ("a" if (major, minor) == (9, 0) else ""))')
    export TORCH_CUDA_ARCH_LIST
  fi
  echo "architectures: ${TORCH_CUDA_ARCH_LIST:-those of CMakeLists.txt}"
  ANDROMEDA_CUDA=1 "$PYTHON" setup.py build_ext --inplace
  "$PYTHON" -c '
import torch
from andromeda.ops import _select
reasons = _select.cuda_unavailable(torch.device("cuda", 0))
if reasons:
    raise SystemExit("the kernels do not run on this GPU: " + "; ".join(reasons))'
  "$PYTHON" -m andromeda info
}

# Several processes at once, where pytest can: most of a test is launching and comparing.
workers() { "$PYTHON" -c 'import xdist' 2>/dev/null && echo "-n ${1:-4}" || true; }

run_tests() {
  local failed=0
  # These watch the memory of the GPU and keep it busy: alone.
  "$PYTHON" -m pytest -q --device cuda -p no:cacheprovider tests/test_cuda.py || failed=1
  # shellcheck disable=SC2046  # two words
  "$PYTHON" -m pytest -q --device cuda -p no:cacheprovider $(workers) "${DEVICE_TESTS[@]}" || failed=1
  return "$failed"
}

# What the tools are known to report wrongly, and what is done about it:
#   memcheck   libraries ask the driver for functions of other versions and get an error: errors of API calls are not
#              reported. Launches are checked by the code itself (check.cuh).
#   all        torch hands out pieces of large allocations, which hides strays from one into another: without its cache
#              each tensor is an allocation.
#   racecheck, synccheck   other libraries' kernels are not looked at: theirs are not ours to mend, and take minutes.
#   initcheck  looks at all kernels, or it would not see what torch's write.
run_sanitizer() {
  local sanitizer="" candidate tool failed=0
  for candidate in "$(command -v compute-sanitizer || true)" "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer" \
    $("$PYTHON" -c 'import sys; print(*(p + "/nvidia/cu13/bin/compute-sanitizer" for p in sys.path if p))'); do
    [[ -n $sanitizer || ! -f $candidate ]] || sanitizer=$candidate
  done
  if [[ -z $sanitizer ]]; then
    echo "compute-sanitizer not found (PATH, CUDA_HOME, wheel nvidia-cuda-sanitizer-api)"
    return "$NOT_RUN"
  fi
  [[ -x $sanitizer ]] || chmod +x "$sanitizer" # pip leaves the program of the wheel without the permission
  "$sanitizer" --version
  local -A process=()
  for tool in memcheck racecheck initcheck synccheck; do # most of their time is spent before the first kernel
    local -a filter=(--kernel-name kns=andromeda)
    [[ $tool != initcheck ]] || filter=()
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool "$tool" "${filter[@]}" --report-api-errors no \
      --error-exitcode 9 --print-limit 20 "$PYTHON" -m pytest -q --device cuda -p no:cacheprovider tests/test_cuda.py \
      -k small_calls >"$scratch/$tool.log" 2>&1 &
    process[$tool]=$!
  done
  for tool in memcheck racecheck initcheck synccheck; do
    local code=0
    wait "${process[$tool]}" || code=$?
    printf '\n== %s: exit code %d\n' "$tool" "$code"
    cat "$scratch/$tool.log"
    ((code == 0)) || failed=1
  done
  return "$failed"
}

run_wrappers() { "$PYTHON" -m pytest -q -rA --device cuda -p no:cacheprovider tests/emulator/test_wrappers.py; }

run_bench() {
  local failed=0
  # One command each: what was measured survives if time runs out later.
  for pass in forward backward decode; do
    "$PYTHON" benchmarks/attn.py --device cuda --dtype bfloat16 --pass "$pass" --seqlen 8192 --keys 131072 \
      --json "$scratch/attn_$pass.json" || failed=1
  done
  "$PYTHON" benchmarks/qk_norm_rotary.py --device cuda --json "$scratch/qk_norm_rotary.json" || failed=1
  return "$failed"
}

run_host() {
  # Files whose imports are missing here cannot be collected; they are named, and the rest runs.
  local -a files
  mapfile -t files < <("$PYTHON" - "${DEVICE_TESTS[@]}" tests/test_cuda.py <<'PYTHON_CODE'
import ast, importlib.util, pathlib, sys

def missing(path):
    """Names of packages that the file, or one beside it that it imports, needs and this machine lacks."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        for name in {name.partition(".")[0] for name in names}:
            beside = path.with_name(f"{name}.py")
            if beside.exists():
                found |= missing(beside)
            elif name != "emulator" and importlib.util.find_spec(name) is None:
                found.add(name)
    return found

for path in sorted(pathlib.Path("tests").glob("test_*.py")):
    if str(path) not in sys.argv[1:]:
        if names := missing(path):
            print(f"not run here: {path} (needs {', '.join(sorted(names))})", file=sys.stderr)
        else:
            print(path)
PYTHON_CODE
  )
  echo "not run here: tests/emulator but for its wrappers (the same on every machine)"
  # shellcheck disable=SC2046  # two words
  "$PYTHON" -m pytest -q -p no:cacheprovider $(workers 8) "${files[@]}"
}

if [[ -n $inside ]]; then
  "run_$inside"
  exit
fi

# ---- running them ---------------------------------------------------------------------------------------------------

export OUT=${OUT:-benchmarks/results} PYTHON=${PYTHON:-python3} PYTHONUNBUFFERED=1
BUDGET=${BUDGET:-540}
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
scratch=$(mktemp -d)
export scratch
trap 'rm -rf "$scratch"' EXIT
export PYTHONPATH="$PWD:$scratch/site${PYTHONPATH:+:$PYTHONPATH}"
if [[ -n ${WHEELS:-} ]]; then
  "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --target "$scratch/site" "$WHEELS"/*.whl
fi

clocks() {
  nvidia-smi --format=csv,noheader,nounits \
    --query-gpu=name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu 2>/dev/null || true
}

if ! "$PYTHON" -c 'import torch; raise SystemExit(not torch.cuda.is_available())'; then
  echo "gpu.sh: torch of $PYTHON finds no CUDA device" >&2
  exit 1
fi
clocks >"$scratch/clocks_before"
deadline=0
status=0
for name in "${STEPS[@]}"; do
  ((deadline += ALLOWANCE[$name])) || true
  [[ $name != host ]] || deadline=$BUDGET
  [[ " $only " == *" $name "* ]] || continue
  limit=$(((deadline < BUDGET ? deadline : BUDGET) - SECONDS))
  begin=$SECONDS
  code=0
  if ((limit < 10)); then
    echo "no time left" >"$OUT/gpu_$name.log"
    code=$NOT_RUN
  else
    printf '== %s (at %d s, at most %d s)\n' "$name" "$SECONDS" "$limit"
    timeout --kill-after=5 "$limit" tests/gpu.sh --inside "$name" >"$OUT/gpu_$name.log" 2>&1 || code=$?
    [[ $name != bench ]] || clocks >"$scratch/clocks_after"
  fi
  case $code in
    0) result=passed ;;
    "$NOT_RUN") result="not run: $(tail -n 1 "$OUT/gpu_$name.log")" ;;
    124 | 137) result="out of time after $limit s" ;;
    *) result="failed, exit code $code" ;;
  esac
  if ((code != 0 && code != NOT_RUN)); then
    status=1
    tail -n 25 "$OUT/gpu_$name.log"
  fi
  printf '%s\t%d\t%s\n' "$name" $((SECONDS - begin)) "$result" >>"$scratch/steps.tsv"
done

# ---- one file of results and one table ------------------------------------------------------------------------------

"$PYTHON" - "$OUT/gpu.json" <<'PYTHON_CODE'
import importlib.metadata, json, os, pathlib, platform, subprocess, sys

sys.path.insert(0, "benchmarks")
import report
import torch

PACKAGES = ("torch", "triton", "transformers", "pytest", "pybind11", "cmake", "ninja", "flash-attn")
scratch = pathlib.Path(os.environ["scratch"])

def command(*words):
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None

def version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None

def clocks(name):
    path = scratch / name
    fields = ("name", "driver", "sm_mhz", "memory_mhz", "max_sm_mhz", "power_limit_w", "celsius")
    if not path.exists():
        return None
    return [dict(zip(fields, line.split(", "))) for line in path.read_text().splitlines()]

commit = report.commit()
gpu = torch.cuda.get_device_properties(0)
facts = {
    "commit": os.environ.get("COMMIT", commit) if commit == "unknown" else commit,
    "gpu": gpu.name,
    "multiprocessors": gpu.multi_processor_count,
    "memory_mib": gpu.total_memory // 2**20,
    "clocks_before": clocks("clocks_before"),
    "clocks_after": clocks("clocks_after"),
    "python": platform.python_version(),
    "cuda_of_torch": torch.version.cuda,
    "nvcc": (command("nvcc", "--version") or "not on PATH").splitlines()[-1],
    "versions": {name: version(name) for name in PACKAGES},
}
lines = (line.split("\t") for line in (scratch / "steps.tsv").read_text().splitlines())
steps = [{"step": name, "seconds": int(seconds), "result": result} for name, seconds, result in lines]
measured = {path.stem: json.loads(path.read_text()) for path in sorted(scratch.glob("*.json"))}
bars = [bar for data in measured.values() for bar in data.get("bars", ()) if bar["measured"] is not None]
data = {"environment": facts, "steps": steps, "bars": bars, "measured": measured}
report.write_text(pathlib.Path(sys.argv[1]), json.dumps(data, indent=1) + "\n")

columns = ("op", "pass", "shape", "backend", "median_ms", "tflops", "effective_tflops", "gbps", "of_matmul", "of_copy")
for name, found in measured.items():
    print(report.table(found["rows"], columns), *found["notes"], "", sep="\n")
print(report.table(steps, ("step", "seconds", "result")))
if bars:
    print(report.table(bars, report.BAR_COLUMNS))
print(f"{facts['gpu']}, torch {torch.__version__}, commit {facts['commit']}; logs and gpu.json in {os.environ['OUT']}")
PYTHON_CODE
exit $status
