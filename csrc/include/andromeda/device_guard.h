// The GPU on which a call runs.
#pragma once

namespace andromeda::cuda {

// Makes a device the current one of this thread for its lifetime; costs almost nothing if it already is.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = -1;  // the device to return to; -1: no other one
};

}  // namespace andromeda::cuda
