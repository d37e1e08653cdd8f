// Size expressions of kernel packs: postfix, see "Expressions" in docs/kernel-packs.md.
#ifndef LONGSPAN_CUDA_EXPRESSION_H_
#define LONGSPAN_CUDA_EXPRESSION_H_

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace longspan::cuda {

// An expression is malformed, or has no value for the sizes at hand.
class InvalidExpression : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// The sizes that expressions may name: those of the operands first, then whatever the paths of a pack define.
class SizeNames {
 public:
  SizeNames();

  // Number of a name; -1 where there is none.
  int Find(std::string_view name) const;
  // Number of a name, which is added where it is new.
  int Add(std::string_view name);
  const std::string& Name(int number) const { return names_[static_cast<size_t>(number)]; }
  size_t Count() const { return names_.size(); }

 private:
  std::vector<std::string> names_;
};

// Numbers of the sizes of the operands, in SizeNames' order.
enum Size { kB, kHq, kHkv, kSq, kSk, kD, kDv, kSms, kLeft, kRight, kW, kWFull, kM, kBLists, kHLists, kOperandSizes };

// All whole numbers from `low` to `high`.
struct Range {
  int64_t low = 0, high = 0;
};

class Expression {
 public:
  Expression() = default;

  // Checks everything that does not depend on values. `known` says of each number of `names` whether the expression may
  // read it. Throws InvalidExpression.
  Expression(std::string_view text, const SizeNames& names, const std::vector<bool>& known);

  // Throws InvalidExpression on overflow and on bad operands of a division.
  int64_t Evaluate(const std::vector<int64_t>& sizes) const;

  // A range that holds the value for any sizes in these ranges; exact where each of them is one number. Empty where
  // there is no value for any of them.
  std::optional<Range> Bounds(const std::vector<Range>& sizes) const;

  // Sets the numbers of the sizes that the value depends on.
  void MarkSizes(std::vector<bool>* used) const;

  const std::string& text() const { return text_; }

 private:
  enum Op { kNumber, kName, kAdd, kSubtract, kMultiply, kDivide, kRemainder, kCeil, kMin, kMax, kLessEqual, kBoth };
  struct Token {
    Op op;
    int64_t value;  // of a number; number of a name
  };

  static Op Operator(std::string_view token);
  int64_t Apply(Op op, int64_t left, int64_t right) const;
  static std::optional<Range> Apply(Op op, Range left, Range right);

  std::string text_;
  std::vector<Token> tokens_;
};

}  // namespace longspan::cuda

#endif  // LONGSPAN_CUDA_EXPRESSION_H_
