#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <tuple>

#include "calls.h"

namespace py = pybind11;

namespace moekern {

void bind_io(py::module_& m);
void bind_read(py::module_& m);
void bind_refit(py::module_& m);

namespace {

Score score_of(const Args& args, const std::string& name) {
  if (name == "softmax") return Score::softmax;
  if (name == "sigmoid") return Score::sigmoid;
  if (name == "sqrtsoftplus") return Score::sqrtsoftplus;
  if (name == "identity") return Score::identity;
  args.fail("score", "expected softmax, sigmoid, sqrtsoftplus or identity, got " + name);
}

void router_stats(py::object logits_, py::object idx_, py::object weight_, py::object mask_, py::object sums,
                  const std::string& score, int threads, const std::string& level, uintptr_t stream) {
  Args args("router_stats");
  RouterStats call;
  call.count = args.sum<int64_t>(sums, "count", "E");
  const Tensor idx = args.tensor("topk_idx", idx_, kInts, "T K");
  const Tensor weight = args.tensor("topk_weight", weight_, kFloats, "T K");
  const Tensor logits = logits_.is_none() ? Tensor{} : args.tensor("logits", logits_, kFloats, "T E");
  Tensor mask;
  call.logits = logits_.is_none() ? Typed{} : logits.typed();
  call.idx = idx.typed();
  call.weight = weight.typed();
  call.mask = mask_of(args, mask_, mask);
  call.tokens = args.sum<int64_t>(sums, "tokens", "1");
  call.logit_tokens = args.sum<int64_t>(sums, "logit_tokens", "1");
  call.top1_count = args.sum<int64_t>(sums, "top1_count", "E");
  call.gate_sum = args.sum<double>(sums, "gate_sum", "E");
  call.gate_square_sum = args.sum<double>(sums, "gate_square_sum", "E");
  call.score_sum = args.sum<double>(sums, "score_sum", "E");
  call.entropy_sum = args.sum<double>(sums, "entropy_sum", "1");
  call.margin_sum = args.sum<double>(sums, "margin_sum", "1");
  call.coactivation = args.sum<int64_t>(sums, "coactivation", "E E");
  if (args.measured(sums, "logit_gram")) call.logit_gram = args.sum<double>(sums, "logit_gram", "E E");
  call.T = args["T"];
  call.E = args["E"];
  call.K = args["K"];
  call.score = score_of(args, score);
  launch(args, [&] {
    idx.is_cuda() ? cuda::router_stats(call, stream_of(stream)) : cpu::router_stats(call, {threads, level});
  });
}

void combine_and_measure(py::object y_, py::object weight_, py::object idx_, py::object order_, py::object offsets_,
                         py::object mask_, py::object residual_, py::object sums, py::object out_, int threads,
                         const std::string& level, uintptr_t stream) {
  Args args("combine_and_measure");
  CombineAndMeasure call;
  call.norm_sum = args.sum<double>(sums, "norm_sum", "E");
  const Tensor offsets = args.tensor("offsets", offsets_, {Dtype::i64}, "E+1");
  const Tensor y = args.tensor("y", y_, kFloats, "N H");
  const Tensor order = args.tensor("order", order_, {Dtype::i64}, "N");
  const Tensor idx = args.tensor("topk_idx", idx_, kInts, "T K");
  const Tensor weight = args.tensor("topk_weight", weight_, kFloats, "T K");
  const Tensor out = args.tensor("out", out_, {y.dtype}, "T H");
  Tensor mask, residual;
  call.y = y.typed();
  call.weight = weight.typed();
  call.idx = idx.typed();
  call.order = order.data<const int64_t>();
  call.offsets = offsets.data<const int64_t>();
  call.mask = mask_of(args, mask_, mask);
  call.norm_square_sum = args.sum<double>(sums, "norm_square_sum", "E");
  call.gated_norm_sum = args.sum<double>(sums, "gated_norm_sum", "E");
  call.gated_norm_square_sum = args.sum<double>(sums, "gated_norm_square_sum", "E");
  call.max_abs = args.sum<double>(sums, "max_abs", "E");
  call.pair_sum = args.sum<double>(sums, "pair_sum", "E E");
  if (args.measured(sums, "square_sum")) {
    call.square_sum = args.sum<double>(sums, "square_sum", "E H");
    call.value_sum = args.sum<double>(sums, "value_sum", "E H");
    call.unit_sum = args.sum<double>(sums, "unit_sum", "E H");
  }
  if (!residual_.is_none()) {
    residual = args.tensor("residual", residual_, {y.dtype}, "T H");
    call.residual = residual.data<const void>();
  }
  call.residual_sum = args.sum<double>(sums, "residual_sum", "E");
  call.residual_tokens = args.sum<int64_t>(sums, "residual_tokens", "1");
  call.out = out.data<void>();
  call.T = args["T"];
  call.E = args["E"];
  call.K = args["K"];
  call.H = args["H"];
  call.N = args["N"];
  launch(args, [&] {
    y.is_cuda() ? cuda::combine_and_measure(call, stream_of(stream)) : cpu::combine_and_measure(call, {threads, level});
  });
}

void mixture_stats(py::object y_, py::object weight_, py::object share_, py::object idx_, py::object order_,
                   py::object offsets_, py::object mask_, py::object sums, py::object gram_, int threads,
                   const std::string& level, uintptr_t stream) {
  Args args("mixture_stats");
  MixtureStats call;
  const Tensor offsets = args.tensor("offsets", offsets_, {Dtype::i64}, "E+1");
  const Tensor y = args.tensor("y", y_, kFloats, "N H");
  const Tensor order = args.tensor("order", order_, {Dtype::i64}, "N");
  const Tensor idx = args.tensor("topk_idx", idx_, kInts, "T K");
  const Tensor weight = args.tensor("topk_weight", weight_, kFloats, "T K");
  const Tensor share = args.tensor("share", share_, kFloats, "T K");
  Tensor mask, gram;
  call.y = y.typed();
  call.weight = weight.typed();
  call.share = share.typed();
  call.idx = idx.typed();
  call.order = order.data<const int64_t>();
  call.offsets = offsets.data<const int64_t>();
  call.mask = mask_of(args, mask_, mask);
  if (!sums.is_none()) {
    call.norm_sum = args.sum<double>(sums, "mixture_norm_sum", "E");
    call.square_sum = args.sum<double>(sums, "mixture_square_sum", "E");
    call.left_norm_sum = args.sum<double>(sums, "left_out_norm_sum", "E");
    call.left_square_sum = args.sum<double>(sums, "left_out_square_sum", "E");
    call.share_sum = args.sum<double>(sums, "share_sum", "1");
    call.share_square_sum = args.sum<double>(sums, "share_square_sum", "1");
  }
  if (!gram_.is_none()) {
    gram = args.tensor("gram", gram_, {Dtype::f64}, "E E");
    call.gram = gram.data<double>();
  }
  call.T = args["T"];
  call.E = args["E"];
  call.K = args["K"];
  call.H = args["H"];
  call.N = args["N"];
  launch(args, [&] {
    y.is_cuda() ? cuda::mixture_stats(call, stream_of(stream)) : cpu::mixture_stats(call, {threads, level});
  });
}

void similarity(py::object y_, py::object norm_square_, py::object mask_, py::object sums, int threads,
                const std::string& level, uintptr_t stream) {
  Args args("similarity");
  const Tensor y = args.tensor("y", y_, kFloats, "E T H");
  Tensor mask, norm_square;
  Similarity call;
  call.y = y.typed();
  if (!norm_square_.is_none()) {
    norm_square = args.tensor("norm_square", norm_square_, {Dtype::f32}, "E T");
    call.norm_square = norm_square.data<const float>();
  }
  call.mask = mask_of(args, mask_, mask);
  call.tokens = args.sum<int64_t>(sums, "tokens", "1");
  call.gram_sum = args.sum<double>(sums, "gram_sum", "E E");
  call.cosine_sum = args.sum<double>(sums, "cosine_sum", "E E");
  call.E = args["E"];
  call.T = args["T"];
  call.H = args["H"];
  launch(args, [&] {
    y.is_cuda() ? cuda::similarity(call, stream_of(stream)) : cpu::similarity(call, {threads, level});
  });
}

void sketch(py::object y_, py::object z_, py::object norm_square_, int64_t seed, int64_t start, int threads,
            const std::string& level, uintptr_t stream) {
  Args args("sketch");
  const Tensor y = args.tensor("y", y_, kFloats, "E T H");
  const Tensor z = args.tensor("z", z_, {Dtype::f32}, "E T M");
  const Tensor norm_square = args.tensor("norm_square", norm_square_, {Dtype::f32}, "E T");
  if (start < 0) args.fail("start", "expected 0 or more, got " + std::to_string(start));
  const Sketch call{y.typed(),  z.data<float>(), norm_square.data<float>(), args["E"], args["T"],
                    args["H"], args["M"],       seed,                      start};
  launch(args, [&] { y.is_cuda() ? cuda::sketch(call, stream_of(stream)) : cpu::sketch(call, {threads, level}); });
}

void vocabulary(py::object token_ids_, py::object idx_, py::object mask_, py::object bits_, int threads,
                uintptr_t stream) {
  Args args("vocabulary");
  const Tensor bits = args.tensor("bits", bits_, {Dtype::i64}, "E W");
  const Tensor token_ids = args.tensor("token_ids", token_ids_, kInts, "T");
  const Tensor idx = args.tensor("topk_idx", idx_, kInts, "T K");
  Tensor mask;
  const bool* counted = mask_of(args, mask_, mask);
  const Vocabulary call{token_ids.typed(), idx.typed(), counted,  bits.data<uint64_t>(),
                        args["T"],         args["E"],   args["K"], args["W"]};
  launch(args, [&] {
    bits.is_cuda() ? cuda::vocabulary(call, stream_of(stream)) : cpu::vocabulary(call, {threads, ""});
  });
}

template <class OnCpu, class OnCuda>
void count_bits(const char* op, const OnCpu& on_cpu, const OnCuda& on_cuda, const std::string& dims,
                const py::object& bits_, const py::object& count_, const cpu::Run& run, uintptr_t stream) {
  Args args(op);
  const Tensor bits = args.tensor("bits", bits_, {Dtype::i64}, "E W");
  const Tensor count = args.tensor("count", count_, {Dtype::i64}, dims);
  launch(args, [&] {
    const auto call = [&](const auto& kernel, const auto& where) {
      kernel(bits.data<const uint64_t>(), args["E"], args["W"], count.data<int64_t>(), where);
    };
    bits.is_cuda() ? call(on_cuda, stream_of(stream)) : call(on_cpu, run);
  });
}

void popcount(py::object bits, py::object count, int threads, const std::string& level, uintptr_t stream) {
  count_bits("popcount", cpu::popcount, cuda::popcount, "E", bits, count, {threads, level}, stream);
}

void pair_popcount(py::object bits, py::object count, int threads, const std::string& level, uintptr_t stream) {
  count_bits("pair_popcount", cpu::pair_popcount, cuda::pair_popcount, "E E", bits, count, {threads, level}, stream);
}

// bits: of a code, where codes are packed into 32-bit words; 0 where each is a byte.
struct Packing {
  Coding coding;
  int bits;
  bool rows;
};

Packing packing_of(const Args& args, const std::string& name) {
  const std::map<std::string, Packing> codings{
      {"e4m3", {Coding::e4m3, 0, false}},       {"e5m2", {Coding::e5m2, 0, false}},
      {"int8", {Coding::int8, 0, false}},       {"e2m1", {Coding::e2m1, 4, false}},
      {"packed2", {Coding::packed2, 2, false}}, {"packed3", {Coding::packed3, 3, false}},
      {"packed4", {Coding::packed4, 4, false}}, {"packed8", {Coding::packed8, 8, false}},
      {"awq4", {Coding::awq4, 4, false}},       {"awq8", {Coding::awq8, 8, false}},
      {"rows2", {Coding::rows2, 2, true}},      {"rows3", {Coding::rows3, 3, true}},
      {"rows4", {Coding::rows4, 4, true}},      {"rows8", {Coding::rows8, 8, true}}};
  const auto found = codings.find(name);
  if (found == codings.end()) args.fail("coding", "expected one that moekern.kernels.quantised names, got " + name);
  return found->second;
}

// A quantised weight as (codes, coding, scale, zero, group, R, C, block_rows, block_columns), and what holds its memory.
using Stored = std::tuple<py::object, std::string, py::object, py::object, py::object, int64_t, int64_t, int64_t, int64_t>;

struct Borrowed {
  Tensor codes, scale, zero, group;
};

void expect(const Args& args, const char* name, const char* what, int64_t want, int64_t got) {
  if (want != got) args.fail(name, std::string(what) + " " + std::to_string(want) + ", got " + std::to_string(got));
}

Quantised quantised_of(Args& args, const Stored& stored, Borrowed& held) {
  const auto& [codes, coding, scale, zero, group, R, C, block_rows, block_columns] = stored;
  held.codes = args.tensor("codes", codes, {Dtype::u8}, "E L B");
  held.scale = args.tensor("scale", scale, {Dtype::f32, Dtype::bf16, Dtype::f16, Dtype::u8}, "E S Q");
  if (!zero.is_none()) held.zero = args.tensor("zero", zero, {Dtype::f32}, "E S Q");
  if (!group.is_none()) held.group = args.tensor("group", group, {Dtype::i32}, "E R");
  if (std::min(R, C) < 0 || std::max(R, C) >> 48 || std::min(block_rows, block_columns) < 1)
    args.fail("block", "expected positive sizes below 2^48");
  const Packing packing = packing_of(args, coding);
  Quantised q;
  q.codes = held.codes.data<const uint8_t>();
  q.coding = packing.coding;
  q.scale = held.scale.typed();
  q.zero = zero.is_none() ? nullptr : held.zero.data<const float>();
  q.group = group.is_none() ? nullptr : held.group.data<const int32_t>();
  q.E = args["E"];
  q.R = R;
  q.C = C;
  q.L = args["L"];
  q.B = args["B"];
  q.S = args["S"];
  q.Q = args["Q"];
  q.block_rows = block_rows;
  q.block_columns = block_columns;
  const auto parts = [](int64_t n, int64_t size) { return n / size + (n % size != 0); };
  const auto words = [&](int64_t n) { return parts(n * packing.bits, 32); };
  expect(args, "codes", "expected lines", packing.rows ? words(R) : R, q.L);
  expect(args, "codes", "expected bytes a line", packing.bits == 0 ? C : 4 * (packing.rows ? C : words(C)), q.B);
  expect(args, "scale", "expected columns", parts(C, block_columns), q.Q);
  if (q.group)
    expect(args, "group", "expected rows", R, args["R"]);
  else
    expect(args, "scale", "expected rows", parts(R, block_rows), q.S);
  return q;
}

void weight_stats(py::object dense_, const std::optional<Stored>& stored, py::object sums, int threads,
                  const std::string& level, uintptr_t stream) {
  Args args("weight_stats");
  WeightStats call;
  call.count = args.sum<int64_t>(sums, "count", "E");
  call.abs_sum = args.sum<double>(sums, "abs_sum", "E");
  call.square_sum = args.sum<double>(sums, "square_sum", "E");
  call.max_abs = args.sum<double>(sums, "max_abs", "E");
  call.E = args["E"];
  call.N = 0;
  Tensor dense;
  Borrowed held;
  Quantised quantised;
  if (stored) {
    quantised = quantised_of(args, *stored, held);
    call.quantised = &quantised;
  } else {
    dense = args.tensor("weight", dense_, kFloats, "E N");
    call.dense = dense.typed();
    call.N = args["N"];
  }
  launch(args, [&] {
    args.on_cuda() ? cuda::weight_stats(call, stream_of(stream)) : cpu::weight_stats(call, {threads, level});
  });
}

void dequantize(const Stored& stored, py::object out_, int threads, const std::string& level, uintptr_t stream) {
  Args args("dequantize");
  Borrowed held;
  Dequantize call;
  call.weight = quantised_of(args, stored, held);
  const Tensor out = args.tensor("out", out_, kFloats, "E _R _C");
  expect(args, "out", "expected rows", call.weight.R, args["_R"]);
  expect(args, "out", "expected columns", call.weight.C, args["_C"]);
  call.out = out.data<void>();
  call.dtype = out.dtype;
  launch(args, [&] {
    out.is_cuda() ? cuda::dequantize(call, stream_of(stream)) : cpu::dequantize(call, {threads, level});
  });
}

void sort_by_expert(py::object idx_, py::object mask_, py::object order_, py::object offsets_, int threads,
                    uintptr_t stream) {
  Args args("sort_by_expert");
  const Tensor idx = args.tensor("topk_idx", idx_, kInts, "T K");
  Tensor mask;
  SortByExpert call;
  call.idx = idx.typed();
  call.mask = mask_of(args, mask_, mask);
  const Tensor order = args.tensor("order", order_, {Dtype::i64}, std::to_string(args["T"] * args["K"]));
  const Tensor offsets = args.tensor("offsets", offsets_, {Dtype::i64}, "E+1");
  call.order = order.data<int64_t>();
  call.offsets = offsets.data<int64_t>();
  call.T = args["T"];
  call.E = args["E"];
  call.K = args["K"];
  launch(args, [&] {
    idx.is_cuda() ? cuda::sort_by_expert(call, stream_of(stream)) : cpu::sort_by_expert(call, threads);
  });
}

}  // namespace
}  // namespace moekern

PYBIND11_MODULE(_C, m) {
  m.def("router_stats", &moekern::router_stats);
  m.def("combine_and_measure", &moekern::combine_and_measure);
  m.def("mixture_stats", &moekern::mixture_stats);
  m.def("similarity", &moekern::similarity);
  m.def("sketch", &moekern::sketch);
  m.def("vocabulary", &moekern::vocabulary);
  m.def("popcount", &moekern::popcount);
  m.def("pair_popcount", &moekern::pair_popcount);
  m.def("weight_stats", &moekern::weight_stats);
  m.def("dequantize", &moekern::dequantize);
  m.def("sort_by_expert", &moekern::sort_by_expert);
  m.def("levels", &moekern::cpu::levels, "Instruction sets of this CPU that the kernels have code for, narrowest first.");
  m.def("cuda_architectures", &moekern::cuda::architectures, "What device code was compiled for; '' without CUDA.");
  m.def("cuda_device_count", &moekern::cuda::device_count, "Visible CUDA devices that the compiled code runs on.");
  moekern::bind_io(m);
  moekern::bind_read(m);
  moekern::bind_refit(m);
}
