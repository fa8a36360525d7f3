// Linked in place of csrc/cpu and csrc/io: the bindings are here for their CUDA side alone.
#include "../../../csrc/kernels.h"

namespace pybind11 {
class module_;  // its header takes seconds
}

namespace moekern::cpu {
namespace {

[[noreturn]] void refuse() { throw std::logic_error("a CPU tensor on the CUDA side"); }

}  // namespace

std::vector<std::string> levels() { return {}; }
void router_stats(const RouterStats&, const Run&) { refuse(); }
void combine_and_measure(const CombineAndMeasure&, const Run&) { refuse(); }
void mixture_stats(const MixtureStats&, const Run&) { refuse(); }
void similarity(const Similarity&, const Run&) { refuse(); }
void sketch(const Sketch&, const Run&) { refuse(); }
void vocabulary(const Vocabulary&, const Run&) { refuse(); }
void popcount(const uint64_t*, int64_t, int64_t, int64_t*, const Run&) { refuse(); }
void pair_popcount(const uint64_t*, int64_t, int64_t, int64_t*, const Run&) { refuse(); }
void weight_stats(const WeightStats&, const Run&) { refuse(); }
void dequantize(const Dequantize&, const Run&) { refuse(); }
void sort_by_expert(const SortByExpert&, int) { refuse(); }
void expert_gram(const ExpertGram&, const Run&) { refuse(); }
void gated_energy(const GatedEnergy&, const Run&) { refuse(); }
void scatter_residual(const ScatterResidual&, const Run&) { refuse(); }

}  // namespace moekern::cpu

namespace moekern {

void bind_io(pybind11::module_&) {}
void bind_read(pybind11::module_&) {}

}  // namespace moekern
