#include "cuda/selection.h"

#include <algorithm>

#include "cuda/operators.h"
#include "cuda/text.h"

namespace longspan::cuda {
namespace {

// The values that a recipe's `match` line compares with; empty where they are not known.
std::vector<int64_t> ValueOf(const std::string& name, const Node& node, const Sizes& sizes) {
  const auto known = [](int64_t size) { return size < 0 ? std::vector<int64_t>{} : std::vector<int64_t>{size}; };
  if (name == "D") return known(sizes.head_size);
  if (name == "D_v") return known(sizes.v_head_size);
  if (name == "group") return known(sizes.group);
  if (name == "lists_per_head") return known(sizes.lists_per_head);
  if (name == "softcap") return {node.floats.at("softcap") > 0};
  if (name == "dilation") {
    const std::vector<int64_t>& all = node.dilation;
    const bool same = std::all_of(all.begin(), all.end(), [&all](int64_t step) { return step == all[0]; });
    return same ? std::vector<int64_t>{all[0]} : all;
  }
  return {node.integers.at(name)};
}

std::string Text(const std::vector<int64_t>& values) {
  std::vector<std::string> texts;
  for (const int64_t value : values) texts.push_back(std::to_string(value));
  return Joined(texts);
}

// How much a device of a compute capability prefers a recipe; 0 where it cannot run it.
int Preference(const Recipe& recipe, int capability) {
  const int architecture = recipe.architecture;
  if (recipe.form == "ptx") return architecture <= capability ? architecture : 0;
  if (architecture == capability) return 20000;
  // 8.0, 8.6 and 8.9 are versions of one architecture; 8.7 stands apart, and later code is not portable at all.
  const auto in_family = [](int c) { return c == 80 || c == 86 || c == 89; };
  const bool older = in_family(architecture) && in_family(capability) && architecture < capability;
  return older ? 10000 + architecture : 0;
}

unsigned SharedMemory(const Candidate& candidate) {
  unsigned most = 0;
  for (const Path& path : candidate.recipe->paths) {
    for (const Launch& launch : path.launches) most = std::max(most, candidate.pack->kernels[launch.kernel].shared);
  }
  return most;
}

// Why the device cannot run it; empty where it can.
std::string Unfit(const Candidate& candidate, const Device& device) {
  const Recipe& recipe = *candidate.recipe;
  if (Preference(recipe, device.capability) == 0) {
    return recipe.form + " for sm_" + std::to_string(recipe.architecture);
  }
  const unsigned shared = SharedMemory(candidate);
  if (static_cast<int64_t>(shared) > device.shared_memory) {
    return recipe.form + " for sm_" + std::to_string(recipe.architecture) + " with " + std::to_string(shared) +
           " bytes of shared memory, of which the device has " + std::to_string(device.shared_memory);
  }
  return "";
}

// Fewer differences are nearer.
size_t Distance(const std::string& mismatch) {
  return static_cast<size_t>(std::count(mismatch.begin(), mismatch.end(), ';'));
}

}  // namespace

std::string Mismatch(const Recipe& recipe, const Node& node, const Sizes& sizes) {
  std::vector<std::string> differences;
  const auto differ = [&](const std::string& what, const std::string& has, const std::string& needs) {
    if (has != needs) differences.push_back(what + " " + has + ", not " + needs);
  };
  differ("T is", node.dtype, recipe.dtype);
  differ("inputs are", Joined(node.inputs), Joined(recipe.inputs));
  differ("outputs are", node.lse ? "Y,lse" : "Y", Joined(recipe.outputs));
  for (const auto& [name, needed] : recipe.match) {
    const std::vector<int64_t> has = ValueOf(name, node, sizes);
    // A recipe with lists per head also serves nodes whose heads share them.
    if (has.empty() || has == needed || (name == "lists_per_head" && needed[0] == 1)) continue;
    differ(name + " is", Text(has), Text(needed));
  }
  return Joined(differences, "; ");
}

Sizes Needed(const Recipe& recipe) {
  Sizes needed;
  for (const auto& [name, values] : recipe.match) {
    if (name == "D") needed.head_size = values[0];
    if (name == "D_v") needed.v_head_size = values[0];
    if (name == "group") needed.group = values[0];
    if (name == "lists_per_head" && values[0] == 0) needed.lists_per_head = 0;
  }
  return needed;
}

bool Fits(const Sizes& needed, const Sizes& sizes) {
  return needed.head_size == sizes.head_size && needed.v_head_size == sizes.v_head_size &&
         needed.group == sizes.group && (needed.lists_per_head < 0 || needed.lists_per_head == sizes.lists_per_head);
}

std::vector<Candidates> Select(const std::vector<std::shared_ptr<const Pack>>& packs, const Node& node,
                               const Device& device) {
  std::vector<Candidates> kinds;
  std::string nearest, unfit;
  size_t recipes = 0;
  for (const auto& pack : packs) {
    for (const Recipe& recipe : pack->recipes) {
      if (recipe.op != node.op) continue;
      ++recipes;
      const Candidate candidate{pack, &recipe};
      const std::string mismatch = Mismatch(recipe, node, node.sizes);
      if (!mismatch.empty()) {
        if (nearest.empty() || Distance(mismatch) < Distance(nearest)) nearest = mismatch;
        continue;
      }
      if (const std::string why = Unfit(candidate, device); !why.empty()) {
        if (unfit.find(why) == std::string::npos) unfit += (unfit.empty() ? "" : "; ") + why;
        continue;
      }
      const auto kind = std::find_if(kinds.begin(), kinds.end(),
                                     [&](const Candidates& known) { return known[0].recipe->SameNodes(recipe); });
      if (kind == kinds.end()) {
        kinds.push_back({candidate});
      } else {
        kind->push_back(candidate);
      }
    }
  }
  if (kinds.empty()) {
    std::string why = "no kernel pack is loaded";
    if (!packs.empty()) why = "the kernel packs that are loaded have none for this operator";
    if (recipes > 0) why = "the node differs from the nearest kernel's: " + nearest;
    if (!unfit.empty()) why = "there is " + unfit;
    throw NoKernel("no GPU kernel for " + node.Describe() + " on " + device.Describe() + ": " + why);
  }
  const auto prefer = [&device](const Candidate& a, const Candidate& b) {
    return Preference(*a.recipe, device.capability) > Preference(*b.recipe, device.capability);
  };
  for (Candidates& kind : kinds) std::stable_sort(kind.begin(), kind.end(), prefer);
  // Lists that heads share are read faster by a kernel that knows it.
  std::stable_sort(kinds.begin(), kinds.end(),
                   [](const Candidates& a, const Candidates& b) { return a[0].recipe->match < b[0].recipe->match; });
  return kinds;
}

}  // namespace longspan::cuda
