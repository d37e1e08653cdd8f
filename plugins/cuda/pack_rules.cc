#include "cuda/pack_rules.h"

#include <algorithm>
#include <cstring>
#include <set>
#include <tuple>

#include "cuda/text.h"

namespace longspan::cuda {
namespace {

constexpr int kArchitectures[] = {80, 86, 87, 89, 90, 100, 120};
constexpr int64_t kMaxShared = 227 * 1024, kMaxStack = 1 << 20, kMaxParameterBytes = 4096, kMaxHeadSize = 256;

void Expect(bool good, const std::string& where, std::string_view got, const std::string& allowed) {
  if (!good) throw InvalidPack(where + ": " + Quoted(got) + "; allowed: " + allowed);
}

template <typename Allowed>
void OneOf(const std::string& where, std::string_view got, const Allowed& allowed) {
  Expect(std::find(std::begin(allowed), std::end(allowed), got) != std::end(allowed), where, got,
         Joined(allowed, ", "));
}

void OneOf(const std::string& where, std::string_view got, std::initializer_list<std::string_view> allowed) {
  OneOf<std::initializer_list<std::string_view>>(where, got, allowed);
}

void Between(const std::string& where, int64_t got, int64_t low, int64_t high) {
  Expect(low <= got && got <= high, where, std::to_string(got), std::to_string(low) + " to " + std::to_string(high));
}

void CheckArchitecture(const std::string& where, int got) {
  const bool known = std::find(std::begin(kArchitectures), std::end(kArchitectures), got) != std::end(kArchitectures);
  Expect(known, where + ": architecture", std::to_string(got), "80, 86, 87, 89, 90, 100, 120");
}

bool IsText(std::string_view text) {
  return !text.empty() && std::all_of(text.begin(), text.end(), [](char c) { return c >= ' ' && c <= '~'; });
}

bool IsName(std::string_view text) {
  return !text.empty() && text.size() <= 200 && std::all_of(text.begin(), text.end(), [](char c) {
    return IsLetter(c) || IsDigit(c) || std::strchr("_.:+-", c) != nullptr;
  });
}

bool IsSymbol(std::string_view text, size_t most, bool dollar) {
  const auto first = [dollar](char c) { return IsLetter(c) || c == '_' || (dollar && c == '$'); };
  return !text.empty() && text.size() <= most && first(text[0]) &&
         std::all_of(text.begin(), text.end(), [&](char c) { return first(c) || IsDigit(c); });
}

bool IsIdentifier(std::string_view text) { return IsSymbol(text, 100, false); }

std::string PointerTo(std::string_view dtype) {
  return dtype == "float16" ? "*fp16" : dtype == "bfloat16" ? "*bf16" : "*fp32";
}

bool IsPtx(const Kernel& kernel) {
  return std::all_of(kernel.code, kernel.code + kernel.code_size,
                     [](uint8_t c) { return c == '\t' || c == '\n' || c == '\r' || (c >= 0x20 && c <= 0x7e); });
}

// Returns how many bytes the parameter has.
int64_t CheckParameter(const Parameter& parameter, const std::string& kernel) {
  Expect(IsIdentifier(parameter.name), kernel + ": parameter", parameter.name, "an identifier");
  const std::string where = kernel + ": parameter " + parameter.name;
  OneOf(where + ": type", parameter.type, {"*fp16", "*bf16", "*fp32", "*u8", "*i32", "*i64", "i32", "i64", "fp32"});
  const std::string divisor = std::to_string(parameter.divisor);
  OneOf(where + ": divisor", divisor, {"1", "2", "4", "8", "16"});
  return parameter.kind == ParameterType::kPointer || parameter.kind == ParameterType::kInt64 ? 8 : 4;
}

void CheckKernel(const Kernel& kernel) {
  Expect(IsName(kernel.name), "kernel", kernel.name, "a name of up to 200 letters, digits and _.:+-");
  const std::string where = "kernel " + kernel.name;
  CheckArchitecture(where, kernel.architecture);
  OneOf(where + ": form", kernel.form, {"cubin", "ptx"});
  Expect(IsSymbol(kernel.entry, 200, true), where + ": entry", kernel.entry, "a symbol of up to 200 characters");
  Expect(kernel.threads % 32 == 0 && kernel.threads >= 32 && kernel.threads <= 1024, where + ": threads",
         std::to_string(kernel.threads), "multiples of 32 up to 1024");
  Between(where + ": shared memory", kernel.shared, 0, kMaxShared);
  Between(where + ": registers", kernel.registers, 1, 255);
  Between(where + ": stack", kernel.stack, 0, kMaxStack);
  OneOf(where + ": type", kernel.dtype, {"float16", "bfloat16", "float32"});
  Expect(!kernel.parameters.empty(), where + ": parameters", "none", "at least one");
  std::set<std::string_view> names;
  int64_t bytes = 0;
  for (const Parameter& parameter : kernel.parameters) {
    bytes += CheckParameter(parameter, where);
    Expect(names.insert(parameter.name).second, where + ": parameters", parameter.name, "each name once");
  }
  Between(where + ": bytes of parameters", bytes, 4, kMaxParameterBytes);
  if (kernel.form == "cubin" && (kernel.code_size < 4 || std::memcmp(kernel.code,
                                                                     "\x7f"
                                                                     "ELF",
                                                                     4) != 0)) {
    throw InvalidPack(where + ": its code is not a cubin");
  }
  if (kernel.form == "ptx" && !IsPtx(kernel)) throw InvalidPack(where + ": its code is not the text of PTX");
}

auto SortKey(const Kernel& kernel) { return std::tie(kernel.name, kernel.form); }
auto SortKey(const Recipe& recipe) {
  return std::tie(recipe.op, recipe.dtype, recipe.architecture, recipe.form, recipe.inputs, recipe.outputs,
                  recipe.match);
}

template <typename Records>
void CheckSorted(const char* what, const Records& records) {
  for (size_t i = 1; i < records.size(); ++i) {
    if (!(SortKey(records[i - 1]) < SortKey(records[i]))) {
      throw InvalidPack(std::string(what) + ": number " + std::to_string(i) + " is not in order, or is there twice");
    }
  }
}

}  // namespace

std::optional<Meaning> MeaningOf(std::string_view kind, std::string_view what) {
  if (kind == "input") return Meaning::kInput;
  if (kind == "output") return Meaning::kOutput;
  if (kind == "buffer") return Meaning::kBuffer;
  if (kind == "size") return Meaning::kSize;
  if (kind == "attribute") return Meaning::kAttribute;
  if (kind == "scalar") return Meaning::kScalar;
  if (kind != "stride") return std::nullopt;
  const bool digit = !what.empty() && IsDigit(what.back());
  return digit ? Meaning::kAxisStride : Meaning::kRowStride;
}

void CheckAbout(const std::string& kernel, int head_size, int v_head_size, int stages, std::string_view function) {
  const std::string where = "kernel " + kernel;
  Between(where + ": head size", head_size, 1, kMaxHeadSize);
  Between(where + ": head size of the values", v_head_size, 1, kMaxHeadSize);
  Between(where + ": stages", stages, 1, 64);
  Expect(IsName(function), where + ": function", function, "a name");
}

void CheckFeatures(const std::string& kernel, std::string_view features) {
  if (features.empty()) return;
  for (const auto feature : Split(features, ',')) {
    Expect(IsName(feature), "kernel " + kernel + ": feature", feature, "a name");
  }
}

void CheckConstant(const std::string& kernel, std::string_view name, std::string_view value) {
  Expect(IsIdentifier(name), "kernel " + kernel + ": constant", name, "an identifier");
  Expect(IsText(value), "kernel " + kernel + ": constant " + std::string(name), value, "printable ASCII");
}

RecipeRules::RecipeRules(const Recipe& recipe, Pack* pack) : recipe(recipe), pack(*pack), op(FindOperator(recipe.op)) {
  std::vector<std::string_view> names;
  for (const OperatorFact& known : Operators()) names.push_back(known.name);
  Expect(op != nullptr, "recipe: operator", recipe.op, Joined(names, ", "));
  const std::string where = "recipe of " + recipe.op;
  OneOf(where + ": type", recipe.dtype, {"float16", "bfloat16", "float32"});
  CheckArchitecture(where, recipe.architecture);
  OneOf(where + ": form", recipe.form, {"cubin", "ptx"});
  std::vector<std::string> in_order, required;
  for (const InputFact& input : op->inputs) {
    const bool present = std::find(recipe.inputs.begin(), recipe.inputs.end(), input.name) != recipe.inputs.end();
    if (present || input.required) in_order.emplace_back(input.name);
    if (input.required) required.emplace_back(input.name);
  }
  Expect(recipe.inputs == in_order, where + ": inputs", Joined(recipe.inputs),
         "inputs of the operator, in its order, with " + Joined(required) + " among them");
  OneOf(where + ": outputs", Joined(recipe.outputs), {"Y", "Y,lse"});
  CheckMatch();
}

void RecipeRules::CheckMatch() const {
  const std::string where = "recipe of " + recipe.op + ": match";
  std::vector<std::string_view> names;
  for (const auto& [name, values] : recipe.match) names.push_back(name);
  Expect(names == op->matches, where, Joined(names), Joined(op->matches));
  for (const auto& [name, values] : recipe.match) {
    const std::string here = where + " " + name;
    const bool flag = name == "is_causal" || name == "exclude_self" || name == "softcap" || name == "lists_per_head";
    const bool width = name == "D" || name == "D_v";
    Expect(name == "dilation" || values.size() == 1, here, std::to_string(values.size()) + " values", "one value");
    for (const int64_t value : values) {
      Between(here, value, flag ? 0 : 1, flag ? 1 : width ? kMaxHeadSize : (int64_t{1} << 31) - 1);
    }
    const bool same =
        std::all_of(values.begin(), values.end(), [&values](int64_t value) { return value == values[0]; });
    if (values.size() > 1 && same) throw InvalidPack(here + " repeats one value; allowed: that value, once");
  }
}

PathRules::PathRules(const RecipeRules& recipe, std::string_view name, std::string_view condition) : recipe_(recipe) {
  where_ = "recipe of " + recipe.recipe.op;
  Expect(IsName(name), where_ + ": path", name, "a name");
  where_ += ": path " + std::string(name);
  for (int size = 0; size < kLeft; ++size) known_.push_back(true);
  for (int size = kLeft; size < kOperandSizes; ++size) {
    const std::vector<Size>& own = recipe.op->sizes;
    known_.push_back(std::find(own.begin(), own.end(), size) != own.end());
  }
  path_.name = name;
  path_.condition = Parse(condition, ": condition");
}

Expression PathRules::Parse(std::string_view text, const std::string& where) const {
  try {
    return Expression(text, recipe_.pack.size_names, known_);
  } catch (const InvalidExpression& error) {
    throw InvalidPack(where_ + where + ": " + error.what());
  }
}

void PathRules::AddSize(std::string_view name, std::string_view expression) {
  Expression parsed = Parse(expression, ": size " + std::string(name.substr(0, 40)));
  const int found = recipe_.pack.size_names.Find(name);
  const bool taken = found >= 0 && static_cast<size_t>(found) < known_.size() && known_[static_cast<size_t>(found)];
  Expect(IsIdentifier(name) && !taken && !IsOperator(name), where_ + ": size", name,
         "an identifier that nothing else has");
  const auto number = static_cast<size_t>(recipe_.pack.size_names.Add(name));
  if (known_.size() <= number) known_.resize(number + 1, false);
  known_[number] = true;
  path_.sizes.emplace_back(static_cast<int>(number), std::move(parsed));
}

void PathRules::AddBuffer(std::string_view name, std::string_view type, bool zeroed, std::string_view elements) {
  Expect(IsIdentifier(name), where_ + ": buffer", name, "an identifier");
  for (const Buffer& other : path_.buffers) Expect(other.name != name, where_ + ": buffers", name, "each name once");
  OneOf(where_ + ": buffer " + std::string(name) + ": type", type, {"fp32", "i32"});
  path_.buffers.push_back(
      {std::string(name), std::string(type), zeroed, Parse(elements, ": buffer " + std::string(name))});
}

void PathRules::AddLaunch(int64_t number) {
  const std::vector<Kernel>& kernels = recipe_.pack.kernels;
  Expect(number < static_cast<int64_t>(kernels.size()), where_ + ": launch", std::to_string(number),
         "numbers below " + std::to_string(kernels.size()));
  const Kernel& kernel = kernels[static_cast<size_t>(number)];
  const auto facts = [](const std::string& dtype, const std::string& form, int architecture) {
    return dtype + " " + form + " for sm_" + std::to_string(architecture);
  };
  const Recipe& recipe = recipe_.recipe;
  const std::string wanted = facts(recipe.dtype, recipe.form, recipe.architecture);
  const std::string got = facts(kernel.dtype, kernel.form, kernel.architecture);
  Expect(got == wanted, where_ + ": launch of " + kernel.name, got, wanted);
  Launch launch;
  launch.kernel = static_cast<size_t>(number);
  for (size_t axis = 0; axis < 3; ++axis) {
    launch.grid[axis] = Parse(kernel.grid[axis], ": " + kernel.name + ": grid " + "xyz"[axis]);
  }
  for (const Parameter& parameter : kernel.parameters) {
    launch.arguments.push_back(Resolve(parameter, ": " + kernel.name + ": " + parameter.name));
  }
  path_.launches.push_back(std::move(launch));
}

Argument PathRules::Resolve(const Parameter& parameter, const std::string& where) const {
  const Recipe& recipe = recipe_.recipe;
  const std::string here = where_ + where;
  const std::string& what = parameter.what;
  Argument argument;
  std::vector<std::string> types;
  switch (parameter.meaning) {
    case Meaning::kInput: {
      argument.operand = FindInput(what, here + ": input");
      const std::string_view type = recipe_.op->inputs[static_cast<size_t>(argument.operand)].type;
      types = {type.empty() ? PointerTo(recipe.dtype) : std::string(type)};
      break;
    }
    case Meaning::kOutput:
      OneOf(here + ": output", what, recipe.outputs);
      argument.operand = what == "lse";
      types = {what == "lse" ? "*fp32" : PointerTo(recipe.dtype)};
      break;
    case Meaning::kBuffer: {
      std::vector<std::string> names;
      for (const Buffer& buffer : path_.buffers) names.push_back(buffer.name);
      OneOf(here + ": buffer", what, names);
      argument.operand = static_cast<int>(std::find(names.begin(), names.end(), what) - names.begin());
      types = {"*" + path_.buffers[static_cast<size_t>(argument.operand)].type};
      break;
    }
    case Meaning::kSize:
      argument.size = Parse(what, where);
      types = {"i32", "i64"};
      break;
    case Meaning::kAttribute:
      OneOf(here + ": attribute", what, recipe_.op->int_attributes);
      types = {"i32"};
      break;
    case Meaning::kScalar:
      OneOf(here + ": scalar", what, recipe_.op->float_attributes);
      types = {"fp32"};
      break;
    default:
      argument = ResolveStride(parameter, here + ": stride");
      types = {"i64"};
  }
  OneOf(here + ": type", parameter.type, types);
  return argument;
}

Argument PathRules::ResolveStride(const Parameter& parameter, const std::string& where) const {
  const std::string& what = parameter.what;
  const size_t dot = what.find('.');
  const std::string name = what.substr(0, dot), axis = dot == std::string::npos ? "" : what.substr(dot + 1);
  Argument argument;
  if (parameter.meaning == Meaning::kAxisStride) {
    Expect(axis.size() == 1 && axis[0] >= '0' && axis[0] <= '3', where, what, "an input with an axis from 0 to 3");
    argument.operand = FindInput(name, where);
    argument.axis = axis[0] - '0';
    return argument;
  }
  const std::string_view axes[] = {"batch", "head", "row"};
  const auto found = std::find(std::begin(axes), std::end(axes), axis);
  Expect(name.size() == 1 && std::strchr("QKVY", name[0]) != nullptr && found != std::end(axes), where, what,
         "Q, K, V or Y with batch, head or row, or an input that is present with an axis from 0 to 3");
  argument.operand = name[0];
  argument.axis = static_cast<int>(found - std::begin(axes));
  return argument;
}

int PathRules::FindInput(std::string_view name, const std::string& where) const {
  OneOf(where, name, recipe_.recipe.inputs);
  const std::vector<InputFact>& inputs = recipe_.op->inputs;
  const auto found = std::find_if(inputs.begin(), inputs.end(), [name](const InputFact& i) { return i.name == name; });
  return static_cast<int>(found - inputs.begin());
}

Path PathRules::Finish() {
  Expect(!path_.launches.empty(), where_ + ": launches", "none", "at least one");
  return std::move(path_);
}

void CheckPack(const Pack& pack) {
  Expect(IsText(pack.compiler), "compiler", pack.compiler, "printable ASCII");
  CheckSorted("kernels", pack.kernels);
  CheckSorted("recipes", pack.recipes);
  for (const Kernel& kernel : pack.kernels) CheckKernel(kernel);
  std::vector<bool> launched(pack.kernels.size(), false);
  for (const Recipe& recipe : pack.recipes) {
    const std::string where = "recipe of " + recipe.op;
    Expect(!recipe.paths.empty(), where + ": paths", "none", "at least one");
    const std::string& last = recipe.paths.back().condition.text();
    Expect(last == "1", where + ": condition of the last path", last, "1");
    for (const Path& path : recipe.paths) {
      for (const Launch& launch : path.launches) launched[launch.kernel] = true;
    }
  }
  for (size_t i = 0; i < launched.size(); ++i) {
    if (!launched[i]) throw InvalidPack("kernel " + pack.kernels[i].name + ": nothing launches it");
  }
}

}  // namespace longspan::cuda
