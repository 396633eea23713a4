#include "ptx_library.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>

namespace emulator {
namespace {

// With the C library, like numbers (parser.cpp): a file stream needs a locale facet.
std::string read_file(const std::string& path) {
  const std::unique_ptr<std::FILE, int (*)(std::FILE*)> file(std::fopen(path.c_str(), "rb"), &std::fclose);
  if (file == nullptr) throw std::runtime_error("cannot read " + path);
  std::string text;
  char block[1 << 16];
  while (const std::size_t count = std::fread(block, 1, sizeof block, file.get())) text.append(block, count);
  if (std::ferror(file.get()) != 0) throw std::runtime_error("cannot read " + path);
  return text;
}

}  // namespace

void PtxLibrary::set_files(std::vector<std::string> paths) {
  files_.clear();
  is_read_ = false;
  for (std::string& path : paths) files_.push_back({std::move(path)});
}

void PtxLibrary::read() {
  for (File& file : files_) {
    file.text = read_file(file.path);
    const std::size_t target = file.text.find("\n.target sm_");
    if (target == std::string::npos) throw std::runtime_error(file.path + " has no .target");
    char* suffix = nullptr;
    const long number = std::strtol(file.text.c_str() + target + std::strlen("\n.target sm_"), &suffix, 10);
    file.major = static_cast<int>(number / 10);
    file.minor = static_cast<int>(number % 10);
    file.exact = *suffix == 'a';
    const std::string keyword = ".entry ";
    for (std::size_t at = 0; (at = file.text.find(keyword, at)) != std::string::npos;) {
      at += keyword.size();
      file.kernels[file.text.substr(at, file.text.find_first_of("( \t\r\n", at) - at)] = nullptr;
    }
  }
  is_read_ = true;
}

std::shared_ptr<const Kernel> PtxLibrary::find(const std::string& entry, int major, int minor) {
  const auto replacement = replaced_.find(entry);
  if (replacement != replaced_.end()) return replacement->second;
  if (!is_read_) read();
  const auto newness = [](const File& file) { return 100 * file.major + 10 * file.minor + file.exact; };
  File* best = nullptr;
  for (File& file : files_) {
    const bool runs =
        file.exact ? file.major == major && file.minor == minor : 10 * file.major + file.minor <= 10 * major + minor;
    if (runs && file.kernels.count(entry) > 0 && (best == nullptr || newness(file) > newness(*best))) best = &file;
  }
  if (best == nullptr) return nullptr;
  if (best->kernels[entry] == nullptr) {
    for (auto& kernel : parse_ptx(best->text)) best->kernels[name_of(*kernel)] = kernel;
    best->text.clear();
  }
  return best->kernels[entry];
}

void PtxLibrary::replace(const std::string& entry, std::shared_ptr<const Kernel> kernel) {
  if (kernel == nullptr) {
    replaced_.erase(entry);
  } else {
    replaced_[entry] = std::move(kernel);
  }
}

std::string PtxLibrary::architectures_of(const std::string& entry) {
  std::string text;
  for (const File& file : files_) {
    if (file.kernels.count(entry) == 0) continue;
    text += (text.empty() ? "" : ", ") + std::to_string(file.major) + "." + std::to_string(file.minor) +
            (file.exact ? "a" : "");
  }
  return text.empty() ? "none" : text;
}

}  // namespace emulator
