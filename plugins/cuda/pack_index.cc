#include "cuda/pack_index.h"

#include <algorithm>
#include <optional>

#include "cuda/operators.h"
#include "cuda/pack_rules.h"
#include "cuda/text.h"

namespace longspan::cuda {
namespace {

constexpr size_t kAlignment = 16;

size_t Aligned(size_t size) { return (size + kAlignment - 1) / kAlignment * kAlignment; }

using Fields = std::vector<std::string_view>;

// The index's lines, taken one after another.
class Lines {
 public:
  explicit Lines(std::string_view text) : lines_(Split(text, '\n')) { lines_.pop_back(); }

  bool NextIs(std::string_view keyword) const {
    return at_ < lines_.size() && lines_[at_].substr(0, lines_[at_].find('\t')) == keyword;
  }

  // The fields of the next line, which must have that keyword and number of fields.
  Fields Take(std::string_view keyword, size_t count, bool empty_allowed = false) {
    if (at_ == lines_.size()) throw InvalidPack("index: ends where a line " + Quoted(keyword) + " belongs");
    Fields fields = Split(lines_[at_++], '\t');
    if (fields[0] != keyword) Fail("begins with " + Quoted(fields[0]) + ", expected " + Quoted(keyword));
    fields.erase(fields.begin());
    if (fields.size() != count) {
      Fail("has " + std::to_string(fields.size()) + " fields after " + Quoted(keyword) + ", expected " +
           std::to_string(count));
    }
    if (!empty_allowed && std::find(fields.begin(), fields.end(), "") != fields.end()) {
      Fail("has an empty field after " + Quoted(keyword));
    }
    return fields;
  }

  int64_t Number(std::string_view text) const {
    const std::optional<int64_t> number = WholeNumber(text, 18, INT64_MAX);
    if (!number) Fail(Quoted(text) + " is not a whole number");
    return *number;
  }

  // A number that the rules bound well below 2^31; larger ones become one that they refuse.
  int Small(std::string_view text) const { return static_cast<int>(std::min<int64_t>(Number(text), INT32_MAX)); }

  void End() {
    Take("end", 0);
    if (at_ != lines_.size()) throw InvalidPack("index line " + std::to_string(at_ + 1) + ": follows the end");
  }

  // Throws an error about the line taken last.
  [[noreturn]] void Fail(const std::string& what) const {
    throw InvalidPack("index line " + std::to_string(at_) + ": " + what);
  }

 private:
  std::vector<std::string_view> lines_;
  size_t at_ = 0;
};

class Reader {
 public:
  Reader(const std::vector<uint8_t>& data, size_t start, size_t size, Pack* pack)
      : data_(data),
        lines_({reinterpret_cast<const char*>(data.data()) + start, size}),
        end_(start + size),
        pack_(*pack) {}

  void Read() {
    pack_.compiler = lines_.Take("compiler", 1)[0];
    while (lines_.NextIs("kernel")) pack_.kernels.push_back(ReadKernel());
    while (lines_.NextIs("recipe")) pack_.recipes.push_back(ReadRecipe());
    lines_.End();
    if (end_ != data_.size()) {
      throw InvalidPack(std::to_string(data_.size() - end_) + " bytes follow the last kernel's code");
    }
  }

 private:
  Kernel ReadKernel() {
    Kernel kernel;
    const Fields head = lines_.Take("kernel", 8);
    kernel.name = head[0];
    kernel.architecture = lines_.Small(head[1]);
    kernel.form = head[2];
    kernel.entry = head[3];
    kernel.threads = static_cast<unsigned>(lines_.Small(head[4]));
    kernel.shared = static_cast<unsigned>(lines_.Small(head[5]));
    kernel.registers = lines_.Small(head[6]);
    kernel.stack = lines_.Small(head[7]);
    const Fields about = lines_.Take("about", 5);
    kernel.dtype = about[0];
    CheckAbout(kernel.name, lines_.Small(about[1]), lines_.Small(about[2]), lines_.Small(about[3]), about[4]);
    CheckFeatures(kernel.name, lines_.Take("features", 1, true)[0]);
    while (lines_.NextIs("constant")) {
      const Fields constant = lines_.Take("constant", 2);
      CheckConstant(kernel.name, constant[0], constant[1]);
    }
    while (lines_.NextIs("param")) kernel.parameters.push_back(ReadParameter());
    const Fields grid = lines_.Take("grid", 3);
    kernel.grid = {std::string(grid[0]), std::string(grid[1]), std::string(grid[2])};
    ReadCode(&kernel);
    return kernel;
  }

  Parameter ReadParameter() {
    const Fields fields = lines_.Take("param", 5);
    Parameter parameter;
    parameter.name = fields[0];
    parameter.type = fields[1];
    parameter.divisor = lines_.Number(fields[2]);
    parameter.what = fields[4];
    const std::optional<Meaning> meaning = MeaningOf(fields[3], fields[4]);
    if (!meaning) lines_.Fail(Quoted(fields[3]) + " is no kind of parameter");
    parameter.meaning = *meaning;
    parameter.kind = fields[1] == "i32"    ? ParameterType::kInt32
                     : fields[1] == "i64"  ? ParameterType::kInt64
                     : fields[1] == "fp32" ? ParameterType::kFloat32
                                           : ParameterType::kPointer;
    return parameter;
  }

  void ReadCode(Kernel* kernel) {
    const Fields fields = lines_.Take("code", 3);
    const auto offset = static_cast<uint64_t>(lines_.Number(fields[0]));
    const auto size = static_cast<uint64_t>(lines_.Number(fields[1]));
    const size_t expected = Aligned(end_);
    if (offset != expected || expected > data_.size() || size < 1 || size > data_.size() - expected) {
      lines_.Fail(kernel->name + ": code of " + std::to_string(size) + " bytes at " + std::to_string(offset) +
                  "; expected at " + std::to_string(expected) + ", of at least one byte, and within the file's " +
                  std::to_string(data_.size()));
    }
    if (std::any_of(data_.begin() + static_cast<ptrdiff_t>(end_), data_.begin() + static_cast<ptrdiff_t>(expected),
                    [](uint8_t byte) { return byte != 0; })) {
      lines_.Fail(kernel->name + ": something other than zeros stands before its code");
    }
    kernel->code = data_.data() + expected;
    kernel->code_size = size;
    Sha256 hash;
    hash.Update(kernel->code, size);
    kernel->digest = hash.Finish();
    if (Hex(kernel->digest) != fields[2]) {
      lines_.Fail(kernel->name + ": its code differs from what was written (SHA-256)");
    }
    end_ = expected + size;
  }

  Recipe ReadRecipe() {
    Recipe recipe;
    const Fields head = lines_.Take("recipe", 4);
    recipe.op = head[0];
    recipe.dtype = head[1];
    recipe.architecture = lines_.Small(head[2]);
    recipe.form = head[3];
    for (const auto input : Split(lines_.Take("inputs", 1)[0], ',')) recipe.inputs.emplace_back(input);
    for (const auto output : Split(lines_.Take("outputs", 1)[0], ',')) recipe.outputs.emplace_back(output);
    while (lines_.NextIs("match")) {
      const Fields match = lines_.Take("match", 2);
      std::vector<int64_t> values;
      for (const auto value : Split(match[1], ',')) values.push_back(lines_.Number(value));
      recipe.match.emplace_back(match[0], std::move(values));
    }
    const RecipeRules rules(recipe, &pack_);
    while (lines_.NextIs("path")) recipe.paths.push_back(ReadPath(rules));
    return recipe;
  }

  Path ReadPath(const RecipeRules& rules) {
    const Fields head = lines_.Take("path", 2);
    PathRules path(rules, head[0], head[1]);
    while (lines_.NextIs("size")) {
      const Fields size = lines_.Take("size", 2);
      path.AddSize(size[0], size[1]);
    }
    while (lines_.NextIs("buffer")) {
      const Fields buffer = lines_.Take("buffer", 4);
      if (buffer[2] != "0" && buffer[2] != "1") {
        lines_.Fail(Quoted(buffer[2]) + " says whether the buffer is zeroed; allowed: 0 or 1");
      }
      path.AddBuffer(buffer[0], buffer[1], buffer[2] == "1", buffer[3]);
    }
    while (lines_.NextIs("launch")) path.AddLaunch(lines_.Number(lines_.Take("launch", 1)[0]));
    return path.Finish();
  }

  const std::vector<uint8_t>& data_;
  Lines lines_;
  size_t end_;  // of what was read so far: the index, then each code
  Pack& pack_;
};

}  // namespace

void ReadIndex(const std::vector<uint8_t>& data, size_t start, size_t size, Pack* pack) {
  const auto is_text = [](uint8_t c) { return (c >= 0x20 && c <= 0x7e) || c == '\t' || c == '\n'; };
  const auto begin = data.begin() + static_cast<ptrdiff_t>(start);
  const auto end = begin + static_cast<ptrdiff_t>(size);
  if (size == 0 || !std::all_of(begin, end, is_text) || *(end - 1) != '\n') {
    throw InvalidPack("index: is not lines of ASCII text");
  }
  Reader(data, start, size, pack).Read();
}

}  // namespace longspan::cuda
