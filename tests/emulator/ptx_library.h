// The kernels of the build, found as the CUDA driver finds them: by mangled name and compute capability.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "machine.h"

namespace emulator {

// A file is read when a name is first looked up, and parsed when a kernel of it is first launched.
class PtxLibrary {
 public:
  void set_files(std::vector<std::string> paths);
  // The kernel for the newest architecture that a device of this compute capability runs, or nullptr.
  std::shared_ptr<const Kernel> find(const std::string& entry, int major, int minor);
  // From now on `find` gives this kernel for the name; nullptr ends that.
  void replace(const std::string& entry, std::shared_ptr<const Kernel> kernel);
  // The architectures of a kernel: "8.0, 9.0a".
  std::string architectures_of(const std::string& entry);

 private:
  struct File {
    std::string path, text;
    int major = 0, minor = 0;
    bool exact = false;                                            // "sm_90a": no other architecture runs it
    std::map<std::string, std::shared_ptr<const Kernel>> kernels;  // by entry; nullptr until parsed
  };
  void read();

  std::vector<File> files_;
  std::map<std::string, std::shared_ptr<const Kernel>> replaced_;
  bool is_read_ = false;
};

}  // namespace emulator
