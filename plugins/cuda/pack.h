// Kernel packs as docs/kernel-packs.md specifies them: compiled kernels and how nodes are executed by them.
#ifndef LONGSPAN_CUDA_PACK_H_
#define LONGSPAN_CUDA_PACK_H_

#include <array>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "cuda/expression.h"
#include "cuda/sha256.h"

namespace longspan::cuda {

// A file is no kernel pack, or not one that may be launched; the message says why and where.
class InvalidPack : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Where the value of a kernel's parameter comes from.
enum class Meaning { kInput, kOutput, kBuffer, kSize, kRowStride, kAxisStride, kAttribute, kScalar };

enum class ParameterType { kPointer, kInt32, kInt64, kFloat32 };

struct Parameter {
  std::string name;
  std::string type;  // as written
  ParameterType kind = ParameterType::kPointer;
  int64_t divisor = 1;
  Meaning meaning = Meaning::kInput;
  std::string what;  // operand, buffer or attribute; "Q.batch"; an expression's text
};

struct Kernel {
  std::string name;
  int architecture = 0;
  std::string form;
  std::string entry;
  unsigned threads = 0;
  unsigned shared = 0;
  int registers = 0;
  int stack = 0;
  std::string dtype;
  std::vector<Parameter> parameters;
  std::array<std::string, 3> grid;
  const uint8_t* code = nullptr;  // in the pack's data
  size_t code_size = 0;
  Digest digest = {};
};

struct Buffer {
  std::string name;
  std::string type;
  bool zeroed = false;
  Expression elements;
};

// What a parameter's meaning refers to, for one path of one operator.
struct Argument {
  // Position of the input (of a stride's too) on the node; 0 or 1 for Y or lse; number of the buffer; of a row stride
  // one of "QKVY".
  int operand = 0;
  int axis = 0;  // of a stride; of a row stride 0, 1, 2 for batch, head, row
  Expression size;
};

// A kernel of a path, with its expressions in the path's sizes and an argument for each of its parameters.
struct Launch {
  size_t kernel = 0;
  std::array<Expression, 3> grid;
  std::vector<Argument> arguments;
};

struct Path {
  std::string name;
  Expression condition;
  std::vector<std::pair<int, Expression>> sizes;  // by number of the name
  std::vector<Buffer> buffers;
  std::vector<Launch> launches;
};

struct Recipe {
  std::string op;
  std::string dtype;
  int architecture = 0;
  std::string form;
  std::vector<std::string> inputs;
  std::vector<std::string> outputs;
  std::vector<std::pair<std::string, std::vector<int64_t>>> match;
  std::vector<Path> paths;

  // Whether it is for the same nodes as `other`.
  bool SameNodes(const Recipe& other) const {
    return op == other.op && dtype == other.dtype && inputs == other.inputs && outputs == other.outputs &&
           match == other.match;
  }
};

class Pack {
 public:
  // Reads and checks everything. Throws InvalidPack.
  static std::shared_ptr<const Pack> FromBytes(std::vector<uint8_t> data);
  // The same from a file; messages name it. Throws InvalidPack, also where it cannot be read.
  static std::shared_ptr<const Pack> FromFile(const std::string& path);

  // The file.
  const std::vector<uint8_t>& data() const { return data_; }

  std::string id;  // what nodes call it by: the SHA-256 of the header, in hexadecimal digits
  std::string compiler;
  std::vector<Kernel> kernels;
  std::vector<Recipe> recipes;
  SizeNames size_names;

  Pack() = default;
  Pack(const Pack&) = delete;
  Pack& operator=(const Pack&) = delete;

 private:
  std::vector<uint8_t> data_;
};

// Contract and format that this launcher was written for.
constexpr uint32_t kFormatVersion = 1;
constexpr uint32_t kContractVersion = 1;

}  // namespace longspan::cuda

#endif  // LONGSPAN_CUDA_PACK_H_
