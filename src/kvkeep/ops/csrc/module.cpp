// The Python face of the kernels, and the only file that knows of Python. Arrays arrive as
// addresses and sizes: shapes, dtypes and strides are checked by the callers in kvkeep.ops.
#include <nanobind/nanobind.h>

#include <cstdint>

#include "attention.hpp"
#include "backend.hpp"
#include "cpu_features.hpp"
#include "encode.hpp"
#include "leaf.hpp"
#include "sample.hpp"
#include "stream.hpp"
#include "turn.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace kvkeep {
namespace {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// ---- shared
// ----------------------------------------------------------------------------------------------------

void bind_backend(nb::module_& m) {
  nb::enum_<Isa>(m, "Isa")
      .value("PORTABLE", Isa::kPortable)
      .value("AVX2", Isa::kAvx2)
      .value("AVX512", Isa::kAvx512);
  m.def("missing_feature", &missing_feature, "isa"_a);
  nb::class_<Backend>(m, "Backend")
      .def(nb::init<Isa, int>(), "isa"_a, "threads"_a)
      .def_ro("isa", &Backend::isa)
      .def_prop_ro("threads", [](const Backend& b) { return b.pool.threads(); })
      .def_prop_ro("calls", [](const Backend& b) { return b.calls.load(); });
  m.def(
      "read_all",
      [](Backend& backend, uintptr_t data, int64_t bytes) {
        auto turn = backend.enter();
        return read_all(backend, at<uint8_t>(data), bytes);
      },
      "backend"_a, "data"_a, "size"_a, nb::call_guard<nb::gil_scoped_release>());
}

// ---- leaf kernels
// ----------------------------------------------------------------------------------------------

void run_linear(Backend& backend, const PackedWeight& weight, uintptr_t x, int64_t rows,
                int64_t x_stride, uintptr_t bias, uintptr_t out, int64_t out_stride) {
  auto turn = backend.enter();
  linear(backend, weight, {at<void>(x), rows, x_stride}, at<void>(bias),
         {at<void>(out), out_stride});
}

void run_gated_mlp(Backend& backend, const PackedWeight& gate_up, const PackedWeight& down,
                   uintptr_t x, int64_t rows, int64_t x_stride, uintptr_t out, int64_t out_stride) {
  auto turn = backend.enter();
  gated_mlp(backend, gate_up, down, {at<void>(x), rows, x_stride}, {at<void>(out), out_stride});
}

void run_rms_norm(Backend& backend, Dtype dtype, uintptr_t x, int64_t rows, uintptr_t weight,
                  uintptr_t out, int64_t dim, float eps) {
  auto turn = backend.enter();
  rms_norm(backend, dtype, at<void>(x), rows, at<void>(weight), at<void>(out), dim, eps);
}

void run_rotate_heads(Backend& backend, Dtype dtype, uintptr_t x, int64_t rows, int64_t stride,
                      int64_t q_heads, int64_t kv_heads, int64_t dim, uintptr_t cos, uintptr_t sin,
                      uintptr_t q_norm, uintptr_t k_norm, float eps) {
  auto turn = backend.enter();
  rotate_heads(backend, dtype, {at<void>(x), rows, stride, q_heads, kv_heads, dim}, at<void>(cos),
               at<void>(sin), {at<void>(q_norm), at<void>(k_norm), eps});
}

void run_turn_heads(Backend& backend, Dtype dtype, TurnKind kind, uintptr_t order, uintptr_t factor,
                    uintptr_t x, int64_t rows, int64_t row_stride, int64_t head_stride,
                    int64_t heads, int64_t kv_heads, int64_t dim, uintptr_t out) {
  auto turn = backend.enter();
  turn_heads(backend, dtype, {kind, at<int32_t>(order), at<float>(factor)},
             {at<void>(x), rows, row_stride, head_stride, heads, kv_heads, dim, at<void>(out)});
}

void bind_leaf(nb::module_& m) {
  nb::enum_<Dtype>(m, "Dtype").value("F32", Dtype::kF32).value("BF16", Dtype::kBf16);
  nb::class_<PackedWeight>(m, "PackedWeight").def_prop_ro("nbytes", [](const PackedWeight& w) {
    return w.data.bytes() + w.scales.bytes();
  });
  m.def(
      "pack",
      [](Backend& backend, Dtype dtype, bool int8, uintptr_t weight, int64_t n, int64_t k,
         int64_t stride) {
        auto turn = backend.enter();
        return pack_weight(backend, dtype, int8, at<void>(weight), n, k, stride);
      },
      "backend"_a, "dtype"_a, "int8"_a, "weight"_a, "n"_a, "k"_a, "stride"_a,
      nb::call_guard<nb::gil_scoped_release>());
  m.def("linear", &run_linear, "backend"_a, "weight"_a, "x"_a, "rows"_a, "x_stride"_a, "bias"_a,
        "out"_a, "out_stride"_a, nb::call_guard<nb::gil_scoped_release>());
  m.def("gated_mlp", &run_gated_mlp, "backend"_a, "gate_up"_a, "down"_a, "x"_a, "rows"_a,
        "x_stride"_a, "out"_a, "out_stride"_a, nb::call_guard<nb::gil_scoped_release>());
  m.def("rms_norm", &run_rms_norm, "backend"_a, "dtype"_a, "x"_a, "rows"_a, "weight"_a, "out"_a,
        "dim"_a, "eps"_a, nb::call_guard<nb::gil_scoped_release>());
  m.def("rotate_heads", &run_rotate_heads, "backend"_a, "dtype"_a, "x"_a, "rows"_a, "stride"_a,
        "q_heads"_a, "kv_heads"_a, "dim"_a, "cos"_a, "sin"_a, "q_norm"_a, "k_norm"_a, "eps"_a,
        nb::call_guard<nb::gil_scoped_release>());
  nb::enum_<TurnKind>(m, "TurnKind")
      .value("ORDER", TurnKind::kOrder)
      .value("BUTTERFLY", TurnKind::kButterfly)
      .value("MATRIX", TurnKind::kMatrix);
  m.def("turn_heads", &run_turn_heads, "backend"_a, "dtype"_a, "kind"_a, "order"_a, "factor"_a,
        "x"_a, "rows"_a, "row_stride"_a, "head_stride"_a, "heads"_a, "kv_heads"_a, "dim"_a, "out"_a,
        nb::call_guard<nb::gil_scoped_release>());
}

// ---- sampling
// ----------------------------------------------------------------------------------------------

// Sampling takes its turn uncounted: `calls` are the model's.
void bind_sample(nb::module_& m) {
  m.def(
      "find_largest",
      [](Backend& backend, uintptr_t rows, int64_t count, int64_t vocab) {
        std::lock_guard turn(backend.mutex);
        find_largest(backend, at<LargestRow>(rows), count, vocab);
      },
      "backend"_a, "rows"_a, "count"_a, "vocab"_a, nb::call_guard<nb::gil_scoped_release>());
  m.def(
      "draw",
      [](Backend& backend, uintptr_t rows, int64_t count, int64_t vocab) {
        std::lock_guard turn(backend.mutex);
        draw(backend, at<DrawRow>(rows), count, vocab);
      },
      "backend"_a, "rows"_a, "count"_a, "vocab"_a, nb::call_guard<nb::gil_scoped_release>());
}

// ---- codes
// -------------------------------------------------------------------------------------------------

// On the caller's thread, and uncounted: `calls` are the model's.
void bind_encode(nb::module_& m) {
  m.def(
      "encode",
      [](Isa isa, Dtype dtype, uintptr_t k, uintptr_t v, int64_t tiles, int64_t dim, int layout,
         bool first, double narrowed, uintptr_t out, int64_t stride, uintptr_t refused) {
        encode(isa, dtype, {at<void>(k), at<void>(v), tiles, dim},
               static_cast<attention::Layout>(layout), first, narrowed,
               {at<uint8_t>(out), stride, at<uint8_t>(refused)});
      },
      "isa"_a, "dtype"_a, "k"_a, "v"_a, "tiles"_a, "dim"_a, "layout"_a, "first"_a, "narrowed"_a,
      "out"_a, "stride"_a, "refused"_a, nb::call_guard<nb::gil_scoped_release>());
  m.def(
      "rows_of_tiles",
      [](uintptr_t tiles, int64_t count, int64_t dim, int64_t element, uintptr_t k, uintptr_t v) {
        rows_of_tiles(at<uint8_t>(tiles), count, dim, element, at<uint8_t>(k), at<uint8_t>(v));
      },
      "tiles"_a, "count"_a, "dim"_a, "element"_a, "k"_a, "v"_a,
      nb::call_guard<nb::gil_scoped_release>());
}

// ---- attention
// -------------------------------------------------------------------------------------------------

attention::PreparedPlan prepare_plan(const Backend& backend, uintptr_t positions, int64_t rows,
                                     uintptr_t order, uintptr_t groups, uintptr_t parents,
                                     int64_t num_groups, uintptr_t runs, int64_t num_runs,
                                     uintptr_t pages, int64_t num_pages, uintptr_t private_tiles,
                                     int64_t num_private, uintptr_t masks, attention::Layout layout,
                                     int group, int kv_heads, int dim, bool leaves) {
  attention::Plan plan{at<int32_t>(positions), at<int32_t>(order),         at<attention::Run>(runs),
                       at<int32_t>(pages),     at<int32_t>(private_tiles), at<uint64_t>(masks)};
  attention::PlanArrays arrays{plan,
                               at<int32_t[4]>(groups),
                               at<int32_t>(parents),
                               rows,
                               num_groups,
                               num_runs,
                               num_pages,
                               num_private};
  return attention::prepare(arrays, layout, group, kv_heads, dim, backend.pool.threads(), leaves);
}

void bind_attention(nb::module_& m) {
  using namespace attention;
  nb::enum_<Layout>(m, "Layout").value("F32", Layout::kF32).value("BF16", Layout::kBf16);
  nb::class_<PreparedPlan>(m, "PreparedPlan")
      .def_ro("makespan", &PreparedPlan::makespan)
      .def_prop_ro("pieces_beside", &PreparedPlan::pieces_beside);
  m.def("prepare_plan", &prepare_plan, "backend"_a, "positions"_a, "rows"_a, "order"_a, "groups"_a,
        "parents"_a, "num_groups"_a, "runs"_a, "num_runs"_a, "pages"_a, "num_pages"_a,
        "private_tiles"_a, "num_private"_a, "masks"_a, "layout"_a, "group"_a, "kv_heads"_a, "dim"_a,
        "leaves"_a);
  nb::class_<Cache>(m, "Cache")
      .def(
          "__init__",
          [](Cache* to, uintptr_t base, int64_t size, int64_t unit_bytes, uintptr_t table,
             int64_t page_slots, int layers, int layer, int kv_heads, int dim, uintptr_t coded) {
            new (to)
                Cache{at<char>(base), size,     unit_bytes, at<int32_t>(table), page_slots, layers,
                      layer,          kv_heads, dim,        at<int32_t>(coded)};
          },
          "base"_a, "size"_a, "unit_bytes"_a, "table"_a, "page_slots"_a, "layers"_a, "layer"_a,
          "kv_heads"_a, "dim"_a, "coded"_a);
  nb::enum_<Widen>(m, "Widen")
      .value("NO", Widen::kNo)
      .value("FLOATS", Widen::kFloats)
      .value("HALVES", Widen::kHalves);
  nb::class_<Attention>(m, "Attention")
      .def(nb::init<Backend&, Widen>(), "backend"_a, "widen"_a, nb::keep_alive<1, 2>())
      .def_prop_ro("decoded", &Attention::decoded)
      .def_prop_ro("bytes_read", &Attention::bytes_read)
      .def_prop_ro("calls", &Attention::calls)
      .def("spin", &Attention::spin, "layout"_a, "rounds"_a,
           nb::call_guard<nb::gil_scoped_release>())
      .def(
          "append",
          [](Attention& self, Layout layout, const Cache& cache, uintptr_t k, int64_t k_token,
             int64_t k_head, uintptr_t v, int64_t v_token, int64_t v_head, uintptr_t slots,
             int64_t count) {
            self.append(layout, cache,
                        {at<void>(k), at<void>(v), k_token, k_head, v_token, v_head,
                         at<int32_t>(slots), count});
          },
          "layout"_a, "cache"_a, "k"_a, "k_token"_a, "k_head"_a, "v"_a, "v_token"_a, "v_head"_a,
          "slots"_a, "count"_a, nb::call_guard<nb::gil_scoped_release>())
      .def(
          "attend",
          [](Attention& self, const PreparedPlan& plan, const Cache& cache, uintptr_t q,
             int64_t q_token, int64_t q_head, uintptr_t out, uintptr_t lse2, float scale,
             uintptr_t thresholds, uintptr_t hits, uintptr_t stamps, uintptr_t carried,
             uintptr_t left) {
            self.attend(plan,
                        {at<void>(q),
                         q_token,
                         q_head,
                         at<void>(out),
                         at<float>(lse2),
                         plan.group,
                         false,
                         nullptr,
                         false,
                         scale,
                         {},
                         cache,
                         nullptr,
                         0,
                         at<float>(thresholds),
                         at<uint64_t>(hits),
                         at<int32_t>(stamps),
                         nullptr,
                         nullptr,
                         nullptr},
                        at<float>(carried), at<float>(left));
          },
          "plan"_a, "cache"_a, "q"_a, "q_token"_a, "q_head"_a, "out"_a, "lse2"_a, "scale"_a,
          "thresholds"_a, "hits"_a, "stamps"_a, "carried"_a, "left"_a,
          nb::call_guard<nb::gil_scoped_release>())
      .def(
          "merge",
          [](Attention& self, Layout layout, uintptr_t outs, uintptr_t lse2s, int64_t parts,
             int64_t rows, int dim, uintptr_t out, uintptr_t lse2) {
            self.merge(layout, at<void>(outs), at<float>(lse2s), parts, rows, dim, at<void>(out),
                       at<float>(lse2));
          },
          "layout"_a, "outs"_a, "lse2s"_a, "parts"_a, "rows"_a, "dim"_a, "out"_a, "lse2"_a,
          nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace
}  // namespace kvkeep

NB_MODULE(_native, m) {
  kvkeep::bind_backend(m);
  kvkeep::bind_leaf(m);
  kvkeep::bind_sample(m);
  kvkeep::bind_encode(m);
  kvkeep::bind_attention(m);
}
