#include "parallel.h"

#include <dlfcn.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace andromeda::cpu {
namespace {

// GNU's OpenMP entry point, which LLVM's and Intel's runtimes export too. It is looked up among the libraries that the
// process has loaded, never linked: linking would bring a second runtime beside the one inside torch's wheel.
using OpenMpParallel = void (*)(void (*body)(void*), void* argument, unsigned num_threads, unsigned flags);

OpenMpParallel find_openmp() {
  static const auto entry = reinterpret_cast<OpenMpParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return entry;
}

// The workers of an OpenMP runtime do not survive fork(), and using it in the child hangs.
const pid_t loading_process = getpid();

struct Job {
  std::int64_t num_tasks;
  TaskFunction function;
  const void* body;
  std::atomic<std::int64_t> next_task{0};
  std::atomic<int> next_worker{0};
  std::mutex error_mutex;
  std::exception_ptr error;

  void run() {
    const int worker = next_worker.fetch_add(1);
    try {
      for (std::int64_t task; (task = next_task.fetch_add(1)) < num_tasks;) function(body, task, worker);
    } catch (...) {
      next_task.store(num_tasks);
      const std::lock_guard<std::mutex> lock(error_mutex);
      if (!error) error = std::current_exception();
    }
  }
};

void run_job(void* job) { static_cast<Job*>(job)->run(); }

}  // namespace

void run_tasks(int num_threads, std::int64_t num_tasks, TaskFunction function, const void* body) {
  num_threads = static_cast<int>(std::min<std::int64_t>(std::max(num_threads, 1), num_tasks));
  Job job;
  job.num_tasks = num_tasks;
  job.function = function;
  job.body = body;
  if (num_threads <= 1) {
    job.run();
  } else if (find_openmp() != nullptr && getpid() == loading_process) {
    find_openmp()(run_job, &job, static_cast<unsigned>(num_threads), 0);
  } else {
    std::vector<std::thread> threads;
    threads.reserve(num_threads - 1);
    try {
      for (int i = 1; i < num_threads; ++i) threads.emplace_back(run_job, &job);
    } catch (const std::exception&) {
      // The system has no more threads to give, or no memory for one: those that started share the work.
    }
    job.run();
    for (std::thread& thread : threads) thread.join();
  }
  if (job.error) std::rethrow_exception(job.error);
}

}  // namespace andromeda::cpu
