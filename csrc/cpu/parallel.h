// Work shared between threads: parallel_for(threads, tasks, body) calls body(task), or body(task, worker), once for
// every task. Tasks are handed out in ascending order, one at a time. An exception thrown by a task is rethrown here.
// No two tasks run at the same time with the same worker, 0 <= worker < num_threads: scratch memory is kept per worker.
//
// The threads are those of the OpenMP runtime that torch has already loaded: a pool of our own would run beside
// torch's workers, which spin for a while after every torch operator, and the two would fight for the cores.
#pragma once

#include <cstdint>
#include <type_traits>

namespace andromeda::cpu {

using TaskFunction = void (*)(const void* body, std::int64_t task, int worker);

void run_tasks(int num_threads, std::int64_t num_tasks, TaskFunction function, const void* body);

// A template over the caller's own lambda, not std::function: this header is compiled once per instruction set, and
// the linker would merge the members of std::function into one copy, built for whichever it met first.
template <typename Body>
void parallel_for(int num_threads, std::int64_t num_tasks, const Body& body) {
  run_tasks(
      num_threads, num_tasks,
      [](const void* context, std::int64_t task, int worker) {
        const Body& call = *static_cast<const Body*>(context);
        if constexpr (std::is_invocable_v<const Body&, std::int64_t, int>) {
          call(task, worker);
        } else {
          call(task);
        }
      },
      &body);
}

}  // namespace andromeda::cpu
