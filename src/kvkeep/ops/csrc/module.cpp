// The Python face of the kernels, and the only file that knows of Python. Arrays arrive as addresses and sizes:
// shapes, dtypes and strides are checked by the callers in kvkeep.ops.
#include <nanobind/nanobind.h>

#include <cstdint>

#include "backend.hpp"
#include "cpu_features.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace kvkeep {
namespace {

// ---- shared ----------------------------------------------------------------------------------------------------

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
}

// ---- leaf kernels ----------------------------------------------------------------------------------------------

// ---- attention -------------------------------------------------------------------------------------------------

void bind_attention(nb::module_& m) { (void)m; }

}  // namespace
}  // namespace kvkeep

NB_MODULE(_native, m) {
  kvkeep::bind_backend(m);
  kvkeep::bind_attention(m);
}
