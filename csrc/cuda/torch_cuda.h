// The only libtorch_cuda function that the operators need, looked up on first use: if _C linked that library, it would
// not load where torch has no CUDA.
#pragma once

#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <stdexcept>
#include <string>

namespace slm_fast::cuda {

// torch's current cudaStream_t on this device.
inline void* current_stream(int32_t device) {
  using Get = AOTITorchError (*)(int32_t device, void** stream);  // as in shim.h with USE_CUDA
  static const Get get = [] {
    const char* name = "aoti_torch_get_current_cuda_stream";
    void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);  // only if torch has loaded it
    void* function = library ? dlsym(library, name) : nullptr;
    if (!function)
      throw std::runtime_error(
          std::string("slm_fast: the CUDA operators need a torch >= 2.10 built with CUDA; this one has no ") +
          (library ? name : "libtorch_cuda.so"));
    return reinterpret_cast<Get>(function);
  }();
  void* stream = nullptr;
  if (get(device, &stream) != AOTI_TORCH_SUCCESS)
    throw std::runtime_error("slm_fast: torch has no CUDA stream for cuda:" + std::to_string(device));
  return stream;
}

}  // namespace slm_fast::cuda
