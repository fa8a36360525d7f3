// The ops of refitting a layer: see bindings.cpp for the others.
#include "calls.h"

namespace py = pybind11;

namespace moekern {
namespace {

constexpr auto kFloat = {Dtype::f32};
constexpr auto kLong = {Dtype::i64};

void expert_gram(py::object a_, py::object r_, py::object tokens_, py::object offsets_, py::object mask_,
                 py::object sums, int threads, const std::string& level, uintptr_t stream) {
  Args args("expert_gram");
  ExpertGram call;
  const Tensor a = args.tensor("a", a_, kFloat, "N M");
  const Tensor r = args.tensor("r", r_, kFloat, tokens_.is_none() ? "N H" : "T H");
  const Tensor offsets = args.tensor("offsets", offsets_, kLong, "E+1");
  Tensor tokens, mask;
  call.a = a.data<const float>();
  call.r = r.data<const float>();
  call.offsets = offsets.data<const int64_t>();
  if (!tokens_.is_none()) {
    tokens = args.tensor("tokens", tokens_, kLong, "N");
    call.tokens = tokens.data<const int64_t>();
  }
  call.mask = mask_of(args, mask_, mask, "N");
  if (args.measured(sums, "gram")) call.gram = args.sum<double>(sums, "gram", "E M M");
  call.product = args.sum<double>(sums, "product", "E M H");
  call.N = args["N"];
  call.T = args[tokens_.is_none() ? "N" : "T"];
  call.E = args["E"];
  call.M = args["M"];
  call.H = args["H"];
  launch(args, [&] {
    a.is_cuda() ? cuda::expert_gram(call, stream_of(stream)) : cpu::expert_gram(call, {threads, level});
  });
}

void gated_energy(py::object rows_, py::object gates_, py::object offsets_, py::object mask_, py::object energy_,
                  py::object out_, int threads, const std::string& level, uintptr_t stream) {
  Args args("gated_energy");
  GatedEnergy call;
  const Tensor rows = args.tensor("rows", rows_, kFloats, "N M");
  const Tensor gates = args.tensor("gates", gates_, kFloats, "N");
  const Tensor offsets = args.tensor("offsets", offsets_, kLong, "E+1");
  const Tensor energy = args.tensor("energy", energy_, {Dtype::f64}, "E M");
  const Tensor out = args.tensor("out", out_, kFloat, "N M");
  Tensor mask;
  call.rows = rows.typed();
  call.gates = gates.typed();
  call.offsets = offsets.data<const int64_t>();
  call.mask = mask_of(args, mask_, mask, "N");
  call.energy = energy.data<double>();
  call.out = out.data<float>();
  call.N = args["N"];
  call.E = args["E"];
  call.M = args["M"];
  launch(args, [&] {
    rows.is_cuda() ? cuda::gated_energy(call, stream_of(stream)) : cpu::gated_energy(call, {threads, level});
  });
}

void scatter_residual(py::object r_, py::object a_, py::object delta_, py::object tokens_, py::object offsets_,
                      int threads, const std::string& level, uintptr_t stream) {
  Args args("scatter_residual");
  const Tensor r = args.tensor("r", r_, kFloat, "T H");
  const Tensor a = args.tensor("a", a_, kFloat, "N M");
  const Tensor delta = args.tensor("delta", delta_, kFloat, "E M H");
  const Tensor tokens = args.tensor("tokens", tokens_, kLong, "N");
  const Tensor offsets = args.tensor("offsets", offsets_, kLong, "E+1");
  const ScatterResidual call{r.data<float>(),
                             a.data<const float>(),
                             delta.data<const float>(),
                             tokens.data<const int64_t>(),
                             offsets.data<const int64_t>(),
                             args["N"],
                             args["T"],
                             args["E"],
                             args["M"],
                             args["H"]};
  launch(args, [&] {
    r.is_cuda() ? cuda::scatter_residual(call, stream_of(stream)) : cpu::scatter_residual(call, {threads, level});
  });
}

}  // namespace

void bind_refit(py::module_& m) {
  m.def("expert_gram", &expert_gram);
  m.def("gated_energy", &gated_energy);
  m.def("scatter_residual", &scatter_residual);
}

}  // namespace moekern
