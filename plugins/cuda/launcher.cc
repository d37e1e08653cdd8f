#include "cuda/launcher.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "cuda/operators.h"
#include "cuda/text.h"
#include "cuda/workspace.h"

namespace longspan::cuda {
namespace {

constexpr int64_t kSizeBound = int64_t{1} << 31, kLengthBound = int64_t{1} << 30;
constexpr int64_t kMaxGridX = kSizeBound - 1, kMaxGridYZ = 65535;

int64_t Axis(const Operands& operands, int input, size_t axis) {
  const std::optional<Shape>& shape = operands.input_shapes[input];
  return shape && axis < shape->size() ? (*shape)[axis] : 0;
}

// One execution of a recipe, from sizes to launches.
class Execution {
 public:
  Execution(const Node& node, const Device& device, const Candidate& candidate, const Operands& operands)
      : node_(node), device_(device), pack_(*candidate.pack), operands_(operands) {
    sizes_.assign(pack_.size_names.Count(), 0);
    SetOperandSizes();
    const std::vector<Path>& paths = candidate.recipe->paths;
    path_ = &*std::find_if(paths.begin(), paths.end() - 1,
                           [this](const Path& path) { return path.condition.Evaluate(sizes_) != 0; });
    for (const auto& [number, expression] : path_->sizes) Set(number, expression.Evaluate(sizes_));
  }

  // Bytes that `Run` allocates; 0 where nothing is.
  size_t ScratchBytes() const {
    size_t total =
        path_->buffers.empty() ? 0 : kBufferAlignment;  // the allocator's own alignment is not for us to know
    for (const Buffer& buffer : path_->buffers) total += BufferBytes(Elements(buffer));
    return total;
  }

  void Run(const std::vector<std::shared_ptr<const LoadedKernel>>& kernels, CUstream stream, Scratch* scratch) {
    struct Prepared {
      const Kernel* kernel;
      CUfunction function;
      std::array<unsigned, 3> grid;
      std::vector<uint64_t> values;
    };
    AllocateBuffers(scratch);
    std::vector<Prepared> prepared;  // all of them first, so that nothing is launched where one cannot be
    for (const longspan::cuda::Launch& launch : path_->launches) {
      const std::array<unsigned, 3> grid = Grid(launch);
      if (std::find(grid.begin(), grid.end(), 0u) != grid.end()) continue;
      prepared.push_back({&pack_.kernels[launch.kernel], kernels[launch.kernel]->function(), grid, Values(launch)});
    }
    for (const auto& [address, bytes] : zeroed_) {
      device_.driver().Check(device_.api().memset_d8_async(address, 0, bytes, stream), "cuMemsetD8Async");
    }
    for (Prepared& one : prepared) {
      std::vector<void*> pointers;
      for (uint64_t& value : one.values) pointers.push_back(&value);
      const CUresult result =
          device_.api().launch_kernel(one.function, one.grid[0], one.grid[1], one.grid[2], one.kernel->threads, 1, 1,
                                      one.kernel->shared, stream, pointers.data(), nullptr);
      device_.driver().Check(result, "launch of " + one.kernel->name);
    }
  }

 private:
  void Set(int number, int64_t value) {
    if (value >= kSizeBound || value < -kSizeBound) {
      Fail(pack_.size_names.Name(number), " = ", value, ": GPU kernels count up to ", kSizeBound - 1);
    }
    sizes_[static_cast<size_t>(number)] = value;
  }

  void SetOperandSizes() {
    const Shapes& s = operands_.shapes;
    if (s.seq_q + s.seq_k >= kLengthBound) {
      Fail("S_q + S_k = ", s.seq_q + s.seq_k, ": GPU kernels go up to ", kLengthBound - 1);
    }
    const int64_t common[] = {
        s.batch, s.q_num_heads, s.kv_num_heads, s.seq_q,
        s.seq_k, s.head_size,   s.v_head_size,  std::min(device_.multiprocessors, kMostMultiprocessors)};
    for (int number = 0; number < kLeft; ++number) Set(number, common[number]);
    if (node_.op == "SlidingWindowAttention") {
      const int64_t left = node_.integers.at("left_window_size"), right = node_.integers.at("right_window_size");
      const int64_t everything = s.seq_q + s.seq_k;
      Set(kLeft, left < 0 ? everything : left);
      Set(kRight, node_.integers.at("is_causal") != 0 ? 0 : right < 0 ? everything : right);
    } else {
      // Inputs 3 to 6: counts and indices of the partial and of the full blocks; 8: the masks.
      Set(kW, Axis(operands_, 4, 3));
      Set(kWFull, Axis(operands_, 6, 3));
      Set(kM, Axis(operands_, 8, 0));
      Set(kBLists, std::max(Axis(operands_, 3, 0), Axis(operands_, 5, 0)));
      Set(kHLists, std::max(Axis(operands_, 3, 1), Axis(operands_, 5, 1)));
    }
  }

  int64_t Elements(const Buffer& buffer) const {
    const int64_t elements = buffer.elements.Evaluate(sizes_);
    if (elements < 0 || elements > kMostElements) Fail("buffer ", buffer.name, " of ", elements, " elements");
    return elements;
  }

  // All buffers are one allocation, each at a multiple of 256 bytes and with an address of its own.
  void AllocateBuffers(Scratch* scratch) {
    const size_t total = ScratchBytes();
    if (total == 0) return;
    const auto raw = reinterpret_cast<CUdeviceptr>(scratch->Allocate(total));
    CUdeviceptr next = (raw + kBufferAlignment - 1) / kBufferAlignment * kBufferAlignment;
    for (const Buffer& buffer : path_->buffers) {
      const int64_t elements = Elements(buffer);
      buffers_.push_back(next);
      if (buffer.zeroed && elements > 0) zeroed_.emplace_back(next, static_cast<size_t>(elements) * 4);
      next += BufferBytes(elements);
    }
  }

  std::array<unsigned, 3> Grid(const longspan::cuda::Launch& launch) const {
    std::array<unsigned, 3> grid;
    for (size_t axis = 0; axis < 3; ++axis) {
      const int64_t blocks = launch.grid[axis].Evaluate(sizes_), most = axis == 0 ? kMaxGridX : kMaxGridYZ;
      if (blocks < 0 || blocks > most) {
        Fail(pack_.kernels[launch.kernel].name, ": grid ", "xyz"[axis], " = ", blocks, ": must be 0 to ", most);
      }
      grid[axis] = static_cast<unsigned>(blocks);
    }
    return grid;
  }

  // The parameters, 8 bytes each, of which the kernel reads as many as the type has; with the two null pointers.
  std::vector<uint64_t> Values(const longspan::cuda::Launch& launch) const {
    const Kernel& kernel = pack_.kernels[launch.kernel];
    std::vector<uint64_t> values;
    for (size_t i = 0; i < kernel.parameters.size(); ++i) {
      const Parameter& parameter = kernel.parameters[i];
      if (parameter.kind == ParameterType::kFloat32) {
        const float number = Scalar(parameter.what);
        uint32_t bits = 0;
        std::memcpy(&bits, &number, sizeof bits);
        values.push_back(bits);
        continue;
      }
      const int64_t value = Value(parameter, launch.arguments[i]);
      if (value % parameter.divisor != 0) {
        Fail(parameter.meaning == Meaning::kInput || parameter.meaning == Meaning::kOutput ? "the address of " : "",
             parameter.what, " is ", value, ": GPU kernels need a multiple of ", parameter.divisor);
      }
      if (parameter.kind == ParameterType::kInt32 && value != static_cast<int32_t>(value)) {
        Fail(parameter.what, " = ", value, ": GPU kernels count up to ", kSizeBound - 1);
      }
      values.push_back(static_cast<uint64_t>(value));
    }
    values.insert(values.end(), 2, 0);
    return values;
  }

  int64_t Value(const Parameter& parameter, const Argument& argument) const {
    switch (parameter.meaning) {
      case Meaning::kInput:
        return reinterpret_cast<int64_t>(operands_.inputs[argument.operand]);
      case Meaning::kOutput:
        return reinterpret_cast<int64_t>(argument.operand == 0 ? operands_.output : operands_.lse);
      case Meaning::kBuffer:
        return static_cast<int64_t>(buffers_[static_cast<size_t>(argument.operand)]);
      case Meaning::kSize:
        return argument.size.Evaluate(sizes_);
      case Meaning::kRowStride:
        return RowStride(static_cast<char>(argument.operand), argument.axis);
      case Meaning::kAxisStride:
        return AxisStride(argument.operand, static_cast<size_t>(argument.axis));
      default:
        return node_.integers.at(parameter.what);
    }
  }

  int64_t RowStride(char operand, int axis) const {
    const Shapes& s = operands_.shapes;
    const bool of_queries = operand == 'Q' || operand == 'Y';
    const int64_t heads = of_queries ? s.q_num_heads : s.kv_num_heads, length = of_queries ? s.seq_q : s.seq_k;
    const int64_t size = operand == 'Q' || operand == 'K' ? s.head_size : s.v_head_size;
    if (axis == 0) return heads * length * size;
    if (axis == 1) return s.split_heads ? length * size : size;
    return s.split_heads ? size : heads * size;
  }

  int64_t AxisStride(int input, size_t axis) const {
    const std::optional<Shape>& shape = operands_.input_shapes[input];
    if (!shape || axis >= shape->size()) Fail("an input has no axis ", axis, ", of which a kernel wants the stride");
    if ((*shape)[axis] <= 1) return 0;
    int64_t stride = 1;
    for (size_t i = axis + 1; i < shape->size(); ++i) stride *= (*shape)[i];
    return stride;
  }

  float Scalar(const std::string& name) const {
    const auto found = node_.floats.find(name);
    if (found != node_.floats.end()) return found->second;
    return static_cast<float>(1.0 / std::sqrt(static_cast<double>(operands_.shapes.head_size)));  // scale
  }

  const Node& node_;
  const Device& device_;
  const Pack& pack_;
  const Operands& operands_;
  const Path* path_ = nullptr;
  std::vector<int64_t> sizes_;
  std::vector<CUdeviceptr> buffers_;
  std::vector<std::pair<CUdeviceptr, size_t>> zeroed_;
};

}  // namespace

Launcher::Launcher(Node node, const std::vector<std::shared_ptr<const Pack>>& packs, int ordinal, Modules* modules)
    : node_(std::move(node)), device_(modules->GetDevice(ordinal)) {
  std::string refused;
  CUresult code = kSuccess;
  for (const Candidates& kind : Select(packs, node_, *device_)) {
    for (const Candidate& candidate : kind) {
      try {
        loaded_.push_back(Load(candidate, modules));
        break;
      } catch (const CudaError& error) {  // the next one may do: PTX where machine code does not
        refused += (refused.empty() ? "" : "; ") + std::string(error.what());
        code = error.code;
      }
    }
  }
  if (loaded_.empty()) {
    throw CudaError(
        "no kernel for " + node_.Describe() + " could be loaded into " + device_->Describe() + ": " + refused, code);
  }
}

Launcher::Loaded Launcher::Load(const Candidate& candidate, Modules* modules) const {
  Loaded loaded{candidate, Needed(*candidate.recipe), {}};
  loaded.kernels.resize(candidate.pack->kernels.size());
  for (const Path& path : candidate.recipe->paths) {
    for (const longspan::cuda::Launch& launch : path.launches) {
      std::shared_ptr<const LoadedKernel>& kernel = loaded.kernels[launch.kernel];
      if (kernel == nullptr) kernel = modules->Load(device_, candidate.pack->kernels[launch.kernel]);
    }
  }
  return loaded;
}

const Launcher::Loaded& Launcher::Choose(const Operands& operands) const {
  // All else was compared when the kernels were loaded.
  const Sizes sizes = operands.Known(node_.op);
  for (const Loaded& loaded : loaded_) {
    if (Fits(loaded.needed, sizes)) return loaded;
  }
  const std::string mismatch = Mismatch(*loaded_[0].candidate.recipe, node_, sizes);
  throw NoKernel("no GPU kernel for " + node_.Describe() + " on " + device_->Describe() +
                 ": the node differs from the nearest kernel's: " + mismatch);
}

Launcher::Need Launcher::NeedOf(const Operands& operands) const {
  const Candidate& candidate = Choose(operands).candidate;
  return {candidate.pack, Execution(node_, *device_, candidate, operands).ScratchBytes()};
}

void Launcher::Launch(const Operands& operands, CUstream stream, Scratch* scratch) const {
  const Loaded& loaded = Choose(operands);
  Execution execution(node_, *device_, loaded.candidate, operands);
  const CurrentContext current(*device_);
  execution.Run(loaded.kernels, stream, scratch);
}

}  // namespace longspan::cuda
