#!/bin/sh
# nvcc.sh PTXAS COMMAND...: runs a compiler (with or without ccache in front) and fails on what it calls a note.
#
# PTXAS is the assembler that the compiler calls. ccache must take its content into account, and does not by itself: it
# would give what one ptxas has made to a build with another. ninja sees it in the command.
#
# ptxas says in notes of the series C75.. that the code is correct and slow: it made wgmma wait for every product, since
# registers of one in flight are used, or it ignored setmaxnreg. No option of it makes them errors, as -Werror does with
# the warnings about spills.
# A shell script: the path of cmake changes with every isolated build, and a new command would compile everything again.

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
  # An object file that stays would be taken for a good one by the next build.
  previous=
  for argument; do
    [ "$previous" != -o ] || rm -f -- "$argument"
    previous=$argument
  done
  exit 1
  ;;
esac
exit $status
