#!/bin/sh
# nvcc.sh PTXAS COMMAND...: runs a compiler (with or without ccache in front) and fails if it prints certain notes.
#
# PTXAS is the assembler that the compiler calls. ccache must hash its content, and does not by itself: it would return
# the output of one ptxas to a build with another. ninja sees the path of PTXAS in the command.
#
# The notes C75.. of ptxas say that the code is correct but slow: ptxas made wgmma wait for every product, because
# registers of a product in flight are used, or it ignored setmaxnreg. No option turns these notes into errors, as
# -Werror does with the warnings about spills.
# This is a shell script, not one for cmake: the path of cmake changes with every isolated build, and a changed command
# makes ninja compile everything again.

CCACHE_EXTRAFILES=$1${CCACHE_EXTRAFILES:+:$CCACHE_EXTRAFILES}
export CCACHE_EXTRAFILES
shift

exec 3>&1
messages=$("$@" 2>&1 >&3)
status=$?
[ -z "$messages" ] || printf '%s\n' "$messages" >&2

case $messages in
*'(C75'*)
  printf '%s\n' "andromeda: a note (C75..) of ptxas stops the build. The kernel that it names would be correct and slow:" \
    "  'wait is injected', 'serialized'  registers of a wgmma in flight are used before its wait" \
    "  'setmaxnreg' ignored              the registers per thread at entry are unknown: __launch_bounds__ is missing" >&2
  # The next build would take a remaining object file for a good one.
  previous=
  for argument; do
    [ "$previous" != -o ] || rm -f -- "$argument"
    previous=$argument
  done
  exit 1
  ;;
esac
exit $status
