// Linked in place of the .cu files where CUDA is not compiled.
#include "../kernels.h"

namespace moekern::cuda {
namespace {

[[noreturn]] void refuse() {
  throw std::runtime_error("moekern was built without CUDA: its native kernels take CPU tensors only");
}

}  // namespace

std::string architectures() { return ""; }
int device_count() { return 0; }
void router_stats(const RouterStats&, void*) { refuse(); }
void combine_and_measure(const CombineAndMeasure&, void*) { refuse(); }
void sort_by_expert(const SortByExpert&, void*) { refuse(); }
void mixture_stats(const MixtureStats&, void*) { refuse(); }
void similarity(const Similarity&, void*) { refuse(); }
void sketch(const Sketch&, void*) { refuse(); }
void vocabulary(const Vocabulary&, void*) { refuse(); }
void popcount(const uint64_t*, int64_t, int64_t, int64_t*, void*) { refuse(); }
void pair_popcount(const uint64_t*, int64_t, int64_t, int64_t*, void*) { refuse(); }
void weight_stats(const WeightStats&, void*) { refuse(); }
void dequantize(const Dequantize&, void*) { refuse(); }
void expert_gram(const ExpertGram&, void*) { refuse(); }
void gated_energy(const GatedEnergy&, void*) { refuse(); }
void scatter_residual(const ScatterResidual&, void*) { refuse(); }

}  // namespace moekern::cuda
