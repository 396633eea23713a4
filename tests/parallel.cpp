// A program for test_parallel.py: tasks of csrc/cpu/parallel.cpp that throw, in the thread that its arguments name.
//
//   parallel WHO THREADS [LIBRARY]     LIBRARY: an OpenMP runtime, loaded first
//
// WHO: the thread whose task throws: "caller", "worker", "all" of them, "nested" (a worker inside a task) or "nobody".
// Prints the exception that arrived, and how many of the tasks of a second call ran.
#include "../csrc/cpu/parallel.h"

#include <dlfcn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>

using andromeda::cpu::parallel_for;

namespace {

constexpr int kTasks = 1000;

// Tasks of other threads wait until that thread has thrown, so that it does not find all tasks done.
void throw_in(const std::string& who, int num_threads) {
  const std::thread::id caller = std::this_thread::get_id();
  std::atomic<bool> thrown{false};
  parallel_for(num_threads, kTasks, [&](std::int64_t) {
    const bool is_caller = std::this_thread::get_id() == caller;
    if (who == "all" || is_caller == (who == "caller")) {
      thrown = true;
      throw std::runtime_error("thrown by " + who);
    }
    while (!thrown) std::this_thread::yield();
  });
}

void run(const std::string& who, int num_threads) {
  if (who == "nobody") return;
  if (who != "nested") return throw_in(who, num_threads);
  parallel_for(num_threads, kTasks, [&](std::int64_t) { throw_in("all", num_threads); });
}

void report(const std::string& who, int num_threads) {
  try {
    run(who, num_threads);
    std::printf("nothing");
  } catch (const std::runtime_error& error) {
    std::printf("%s", error.what());
  }
  try {
    parallel_for(num_threads, kTasks, [](std::int64_t) { throw std::bad_alloc(); });
  } catch (const std::bad_alloc&) {
    std::printf(", no memory");
  }
  std::atomic<int> ran{0};
  parallel_for(num_threads, kTasks, [&](std::int64_t) { ++ran; });
  std::printf(", then %d\n", ran.load());
  std::fflush(stdout);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) return EXIT_FAILURE;
  if (argc > 3 && dlopen(argv[3], RTLD_NOW | RTLD_GLOBAL) == nullptr) return EXIT_FAILURE;
  const int num_threads = std::atoi(argv[2]);
  report(argv[1], num_threads);
  const pid_t child = fork();  // a child has no OpenMP workers
  if (child == 0) {
    report(argv[1], num_threads);
    std::_Exit(EXIT_SUCCESS);
  }
  int status = 0;
  return waitpid(child, &status, 0) == child && status == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
