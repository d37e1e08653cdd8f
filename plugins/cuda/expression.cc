#include "cuda/expression.h"

#include <algorithm>
#include <limits>

#include "cuda/text.h"

namespace longspan::cuda {
namespace {

constexpr size_t kMaxTokens = 512;
constexpr size_t kMaxStack = 32;
constexpr int64_t kLargestNumber = (int64_t{1} << 62) - 1;
constexpr std::string_view kOperators[] = {"+", "-", "*", "//", "%", "cdiv", "min", "max", "le", "both"};

bool IsName(std::string_view token) {
  return !token.empty() && (IsLetter(token[0]) || token[0] == '_') &&
         std::all_of(token.begin(), token.end(), [](char c) { return IsLetter(c) || IsDigit(c) || c == '_'; });
}

// Overflows are errors, so that no value is outside int64.
std::optional<Range> Representable(__int128 low, __int128 high) {
  constexpr __int128 least = std::numeric_limits<int64_t>::min(), most = std::numeric_limits<int64_t>::max();
  if (low > most || high < least) return std::nullopt;
  return Range{static_cast<int64_t>(std::max(low, least)), static_cast<int64_t>(std::min(high, most))};
}

}  // namespace

SizeNames::SizeNames()
    : names_{"B",    "H_q",   "H_kv", "S_q",    "S_k", "D",       "D_v",    "SMS",
             "LEFT", "RIGHT", "W",    "W_full", "M",   "B_lists", "H_lists"} {}

int SizeNames::Find(std::string_view name) const {
  const auto found = std::find(names_.begin(), names_.end(), name);
  return found == names_.end() ? -1 : static_cast<int>(found - names_.begin());
}

int SizeNames::Add(std::string_view name) {
  const int found = Find(name);
  if (found >= 0) return found;
  names_.emplace_back(name);
  return static_cast<int>(names_.size()) - 1;
}

bool IsOperator(std::string_view token) {
  return std::find(std::begin(kOperators), std::end(kOperators), token) != std::end(kOperators);
}

Expression::Op Expression::Operator(std::string_view token) {
  const auto found = std::find(std::begin(kOperators), std::end(kOperators), token);
  return found == std::end(kOperators) ? kNumber : static_cast<Op>(kAdd + (found - std::begin(kOperators)));
}

Expression::Expression(std::string_view text, const SizeNames& names, const std::vector<bool>& known) : text_(text) {
  const std::string quoted = Quoted(text);
  size_t depth = 0;
  for (const std::string_view token : Split(text, ' ')) {
    if (tokens_.size() == kMaxTokens) {
      throw InvalidExpression("an expression of more than " + std::to_string(kMaxTokens) + " tokens");
    }
    if (const Op op = Operator(token); op != kNumber) {
      if (depth < 2) throw InvalidExpression(quoted + ": " + std::string(token) + " lacks an operand");
      --depth;
      tokens_.push_back({op, 0});
      continue;
    }
    if (!token.empty() && IsDigit(token[0])) {
      const std::optional<int64_t> number = WholeNumber(token, 19, kLargestNumber);
      if (!number) throw InvalidExpression(quoted + ": " + Quoted(token) + " is no whole number below 2^62");
      tokens_.push_back({kNumber, *number});
    } else {
      if (!IsName(token)) throw InvalidExpression(quoted + ": " + Quoted(token) + " is no number, name or operator");
      const int number = names.Find(token);
      if (number < 0 || static_cast<size_t>(number) >= known.size() || !known[static_cast<size_t>(number)]) {
        throw InvalidExpression(quoted + " needs " + std::string(token) + ", which is no size here");
      }
      tokens_.push_back({kName, number});
    }
    if (++depth > kMaxStack) throw InvalidExpression(quoted + " needs more than 32 values at once");
  }
  if (depth != 1) throw InvalidExpression(quoted + " leaves " + std::to_string(depth) + " values, not one");
}

int64_t Expression::Apply(Op op, int64_t left, int64_t right) const {
  int64_t result = 0;
  bool overflow = false;
  switch (op) {
    case kAdd:
      overflow = __builtin_add_overflow(left, right, &result);
      break;
    case kSubtract:
      overflow = __builtin_sub_overflow(left, right, &result);
      break;
    case kMultiply:
      overflow = __builtin_mul_overflow(left, right, &result);
      break;
    case kMin:
      return std::min(left, right);
    case kMax:
      return std::max(left, right);
    case kLessEqual:
      return left <= right;
    case kBoth:
      return left != 0 && right != 0;
    default:
      if (left < 0 || right < 1) {
        throw InvalidExpression(Quoted(text_) + " divides " + std::to_string(left) + " by " + std::to_string(right) +
                                "; allowed: at least 0, by at least 1");
      }
      if (op == kRemainder) return left % right;
      return left / right + (op == kCeil && left % right != 0);
  }
  if (overflow) throw InvalidExpression(Quoted(text_) + " overflows");
  return result;
}

int64_t Expression::Evaluate(const std::vector<int64_t>& sizes) const {
  int64_t stack[kMaxStack];
  size_t depth = 0;
  for (const Token& token : tokens_) {
    if (token.op == kNumber) {
      stack[depth++] = token.value;
    } else if (token.op == kName) {
      stack[depth++] = sizes[static_cast<size_t>(token.value)];
    } else {
      --depth;
      stack[depth - 1] = Apply(token.op, stack[depth - 1], stack[depth]);
    }
  }
  return stack[0];
}

std::optional<Range> Expression::Apply(Op op, Range left, Range right) {
  using Wide = __int128;
  switch (op) {
    case kAdd:
      return Representable(Wide{left.low} + right.low, Wide{left.high} + right.high);
    case kSubtract:
      return Representable(Wide{left.low} - right.high, Wide{left.high} - right.low);
    case kMultiply: {
      const Wide products[] = {Wide{left.low} * right.low, Wide{left.low} * right.high, Wide{left.high} * right.low,
                               Wide{left.high} * right.high};
      const auto [low, high] = std::minmax_element(std::begin(products), std::end(products));
      return Representable(*low, *high);
    }
    case kMin:
      return Range{std::min(left.low, right.low), std::min(left.high, right.high)};
    case kMax:
      return Range{std::max(left.low, right.low), std::max(left.high, right.high)};
    case kLessEqual:
      return Range{left.high <= right.low, left.low <= right.high};
    case kBoth: {
      const auto zero = [](Range range) { return range.low == 0 && range.high == 0; };
      const auto not_zero = [](Range range) { return range.low > 0 || range.high < 0; };
      return Range{not_zero(left) && not_zero(right), !zero(left) && !zero(right)};
    }
    default:
      break;
  }
  // Divisions of other operands are errors.
  left.low = std::max<int64_t>(left.low, 0);
  right.low = std::max<int64_t>(right.low, 1);
  if (left.low > left.high || right.low > right.high) return std::nullopt;
  if (op == kRemainder) {
    if (left.low == left.high && right.low == right.high) return Range{left.low % right.low, left.low % right.low};
    return Range{0, std::min(left.high, right.high - 1)};
  }
  const auto divide = [op](int64_t a, int64_t b) { return a / b + (op == kCeil && a % b != 0); };
  return Range{divide(left.low, right.high), divide(left.high, right.low)};
}

std::optional<Range> Expression::Bounds(const std::vector<Range>& sizes) const {
  Range stack[kMaxStack];
  size_t depth = 0;
  for (const Token& token : tokens_) {
    if (token.op == kNumber) {
      stack[depth++] = {token.value, token.value};
    } else if (token.op == kName) {
      stack[depth++] = sizes[static_cast<size_t>(token.value)];
    } else {
      --depth;
      const std::optional<Range> value = Apply(token.op, stack[depth - 1], stack[depth]);
      if (!value) return std::nullopt;
      stack[depth - 1] = *value;
    }
  }
  return stack[0];
}

void Expression::MarkSizes(std::vector<bool>* used) const {
  for (const Token& token : tokens_) {
    if (token.op == kName) (*used)[static_cast<size_t>(token.value)] = true;
  }
}

}  // namespace longspan::cuda
