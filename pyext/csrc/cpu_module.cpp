// The Python module kernelpress._cpu: the CPU kernels by raw addresses and sizes (see docs/architecture.md), and the captured plan.
// Arguments were checked by the ops; here only their number is.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <chrono>
#include <cstring>

#include "cpu_calls.h"
#include "cpu_kernels.h"
#include "cpu_plan.h"
#include "cpu_runtime.h"
#include "cpu_snapshot.h"
#include "cpu_tensors.h"
#include "kernels/cpu/args.h"
#include "kernels/cpu/runtime.h"

namespace py = pybind11;

namespace kernelpress {

extern const KernelTable kernels_baseline;
#if defined(__x86_64__)
extern const KernelTable kernels_avx2;
extern const KernelTable kernels_avx2_vnni;
extern const KernelTable kernels_avx512;
extern const KernelTable kernels_avx512_vnni;
#endif

namespace {

// The variants this processor can run, best first.
std::vector<const KernelTable*> runnable_variants() {
  std::vector<const KernelTable*> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && __builtin_cpu_supports("avx512vnni")) found.push_back(&kernels_avx512_vnni);
  if (avx512) found.push_back(&kernels_avx512);
  if (avx2 && __builtin_cpu_supports("avxvnni")) found.push_back(&kernels_avx2_vnni);
  if (avx2) found.push_back(&kernels_avx2);
#endif
  found.push_back(&kernels_baseline);
  return found;
}

const KernelTable* table = runnable_variants().front();

std::vector<std::string> variant_names() {
  std::vector<std::string> names;
  for (const KernelTable* candidate : runnable_variants()) names.emplace_back(candidate->variant);
  return names;
}

void select_variant(const std::string& name) {
  for (const KernelTable* candidate : runnable_variants()) {
    if (name == candidate->variant) {
      table = candidate;
      return;
    }
  }
  std::string known;
  for (const std::string& candidate : variant_names()) known += (known.empty() ? "" : ", ") + candidate;
  throw std::invalid_argument("variant: expected one that this processor runs (" + known + "), got '" + name + "'");
}

template <class Args>
std::vector<int64_t> words_of(const char* kernel, const py::args& values) {
  static_assert(sizeof(Args) % sizeof(int64_t) == 0 && std::is_trivially_copyable_v<Args>);
  constexpr size_t kWords = sizeof(Args) / sizeof(int64_t);
  if (values.size() != kWords) {
    throw py::type_error(std::string(kernel) + ": expected " + std::to_string(kWords) + " integers, got " + std::to_string(values.size()));
  }
  std::vector<int64_t> words(kWords);
  for (size_t i = 0; i < kWords; ++i) {
    words[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(values.ptr(), static_cast<Py_ssize_t>(i)));
    if (words[i] == -1 && PyErr_Occurred()) throw py::error_already_set();
  }
  return words;
}

// Member pointer of the kernel in the table → a function over raw words.
template <class Args, void (*KernelTable::*kKernel)(const Args&)>
void run_words(const KernelTable& kernels, const void* words) {
  Args args;
  std::memcpy(static_cast<void*>(&args), words, sizeof args);
  (kernels.*kKernel)(args);
}

template <class Args>
bool join_words(ChainBuilder& chain, const void* words) {
  Args args;
  std::memcpy(static_cast<void*>(&args), words, sizeof args);
  return chain.append(args);
}

template <class Args, void (*KernelTable::*kKernel)(const Args&)>
void bind_kernel(py::module_& module, py::class_<Plan>& plan, const char* name) {
  if constexpr (std::is_same_v<Args, ChainArgs> || std::is_same_v<Args, Int8ChainArgs>) return;  // made by joining steps alone
  module.def(name, [name](const py::args& values) {
    const std::vector<int64_t> words = words_of<Args>(name, values);
    const py::gil_scoped_release released;
    run_words<Args, kKernel>(*table, words.data());
  });
  named_kernels()[name] = {run_words<Args, kKernel>, sizeof(Args) / sizeof(int64_t)};
  plan.def(name, [name](Plan& self, const py::args& values) {
    self.append(run_words<Args, kKernel>, join_words<Args>, *table, words_of<Args>(name, values), Args::kAddresses);
  });
}

// 10⁹ operations per second of a register-only loop on `threads` threads at once, over about `seconds`.
template <int64_t (*KernelTable::*kBurst)(int64_t)>
double peak(double seconds, int64_t threads) {
  using Clock = std::chrono::steady_clock;
  struct Burst {
    double seconds;
    std::vector<double> rates;
  } burst{seconds, std::vector<double>(static_cast<size_t>(threads), 0.0)};
  parallel_for(
      0, threads,
      [](int64_t begin, int64_t end, void* context) {
        Burst& b = *static_cast<Burst*>(context);
        for (int64_t thread = begin; thread < end; ++thread) {
          const Clock::time_point start = Clock::now();
          double elapsed = 0, operations = 0;
          while (elapsed < b.seconds) {
            operations += static_cast<double>((table->*kBurst)(200000));
            elapsed = std::chrono::duration<double>(Clock::now() - start).count();
          }
          b.rates[static_cast<size_t>(thread)] = operations / elapsed * 1e-9;
        }
      },
      &burst);
  double total = 0;
  for (double rate : burst.rates) total += rate;
  return total;
}

}  // namespace

std::map<std::string, NamedKernel>& named_kernels() {
  static std::map<std::string, NamedKernel> kernels;
  return kernels;
}

const KernelTable& kernels_in_use() { return *table; }

PYBIND11_MODULE(_cpu, module) {
  module.doc() = "CPU kernels of kernelpress: raw addresses, sizes in elements. Use torch.ops.kernelpress instead.";
  py::class_<Plan> plan(module, "Plan");
  plan.def(py::init<>())
      .def("external", &Plan::external, py::arg("address"), py::arg("bytes"))
      .def("run", &Plan::run, py::arg("first"), py::arg("last"), py::arg("addresses"), py::call_guard<py::gil_scoped_release>())
      .def("copy", [](const Plan& self) { return Plan(self); })
      .def(
          "join",
          [](Plan& self, int64_t first, int64_t last) {
            return self.join(first, last, run_words<ChainArgs, &KernelTable::chain>, run_words<Int8ChainArgs, &KernelTable::int8_chain>);
          },
          py::arg("first"), py::arg("last"))
      .def("__len__", &Plan::size);

  module.def("run_side_by_side", &Plan::run_side_by_side, py::arg("plans"), py::arg("addresses"), py::call_guard<py::gil_scoped_release>());

#define KP_BIND(name, Args) bind_kernel<Args, &KernelTable::name>(module, plan, #name);
  KP_KERNELS(KP_BIND)
#undef KP_BIND

  PyObject* types = module.ptr();
  if (!add_snapshot_type(types) || !add_call_types(types) || !add_forms_type(types)) throw py::error_already_set();
  module.def(
      "read_tensors",
      [](const py::object& tensor_type, const py::object& parameter_type, const py::object& is_grad_enabled) {
        if (!learn_tensors(tensor_type.ptr(), parameter_type.ptr(), is_grad_enabled.ptr())) throw py::error_already_set();
        return reads_tensors();
      },
      py::arg("tensor_type"), py::arg("parameter_type"), py::arg("is_grad_enabled"));

  module.def("variant", [] { return std::string(table->variant); });
  module.def("variants", &variant_names);
  module.def("select", &select_variant, py::arg("variant"));
  module.def("panel_width", [] { return table->panel_width; });
  module.def("thread_count", &thread_count);
  module.def(
      "set_parallel_for",
      [](int64_t parallel_for_address, int64_t thread_count_address) {
        use_host_threads(reinterpret_cast<HostParallelFor>(parallel_for_address), reinterpret_cast<HostThreadCount>(thread_count_address));
      },
      py::arg("parallel_for_address"), py::arg("num_threads_address"));
  module.def("advise_huge_pages", &advise_huge_pages, py::arg("address"), py::arg("bytes"));
  module.def("int8_packing", [] {
    const Int8Packing& packing = table->int8_packing;
    return std::make_tuple(packing.outputs, packing.lanes, packing.inputs);
  });
  const auto bind_peak = [&module](const char* name, double (*function)(double, int64_t)) {
    module.def(name, function, py::arg("seconds"), py::arg("threads"), py::call_guard<py::gil_scoped_release>());
  };
  bind_peak("fma_peak", &peak<&KernelTable::fma_burst>);
  bind_peak("int8_peak", &peak<&KernelTable::int8_burst>);
}

}  // namespace kernelpress
