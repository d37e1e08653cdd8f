// Launches the kernels of one node on one device.
#ifndef LONGSPAN_CUDA_LAUNCHER_H_
#define LONGSPAN_CUDA_LAUNCHER_H_

#include <memory>
#include <vector>

#include "cuda/modules.h"
#include "cuda/node.h"
#include "cuda/pack.h"
#include "cuda/selection.h"

namespace longspan::cuda {

// Device memory for one execution, ordered on its stream; freed by whoever made it.
class Scratch {
 public:
  virtual ~Scratch() = default;
  // Throws where there is no memory.
  virtual void* Allocate(size_t bytes) = 0;
};

// Everything is loaded on construction: `Launch` calls nothing but the launch of kernels and, where buffers start with
// zeros, a memset on the stream; so it can be captured into a CUDA graph, and never waits for the device.
class Launcher {
 public:
  // Throws NoKernel where no pack has kernels for the node, CudaError where the driver refuses them all.
  Launcher(Node node, const std::vector<std::shared_ptr<const Pack>>& packs, int ordinal, Modules* modules);

  // Launches one execution on a stream of the device. May be called by several threads at once. Throws NoKernel where
  // no pack has kernels for these shapes, InvalidExpression, InvalidOperands (a pointer that is not aligned, a size
  // beyond what kernels count) and CudaError.
  void Launch(const Operands& operands, CUstream stream, Scratch* scratch) const;

  // What one execution asks its Scratch for, and the pack that runs it. Throws as Launch.
  struct Need {
    std::shared_ptr<const Pack> pack;
    size_t bytes = 0;
  };
  Need NeedOf(const Operands& operands) const;

  const Device& device() const { return *device_; }

 private:
  // The kernels of a recipe, by their number in the pack; null where it does not launch them.
  struct Loaded {
    Candidate candidate;
    Sizes needed;
    std::vector<std::shared_ptr<const LoadedKernel>> kernels;
  };

  Loaded Load(const Candidate& candidate, Modules* modules) const;
  const Loaded& Choose(const Operands& operands) const;

  const Node node_;
  const std::shared_ptr<const Device> device_;
  std::vector<Loaded> loaded_;
};

}  // namespace longspan::cuda

#endif  // LONGSPAN_CUDA_LAUNCHER_H_
