// The only file that includes torch: puts the kernels behind the operators that _ops.py declares.
// Narrow headers: it compiles in seconds and depends on little of torch's interface.
#include <ATen/Context.h>
#include <ATen/TensorIterator.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>

#ifdef DCNV3_WITH_CUDA
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <array>
#include <cstdlib>
#include <mutex>
#endif

#include "dcnv3.h"

namespace {

using at::IntArrayRef;
using at::Tensor;

dcnv3::Dtype dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kDouble: return dcnv3::Dtype::float64;
    case at::kFloat: return dcnv3::Dtype::float32;
    case at::kHalf: return dcnv3::Dtype::float16;
    case at::kBFloat16: return dcnv3::Dtype::bfloat16;
    default: TORCH_CHECK_VALUE(false, "dcnv3: no kernel for ", tensor.scalar_type());
  }
}

// Offset and mask may be slices of a wider tensor (one projection for both): all that the kernels
// ask is one distance between pixels. Anything else is copied.
bool has_pixel_stride(const Tensor& t) {
  return t.stride(3) == 1 && t.stride(1) == t.stride(2) * t.size(2) && t.stride(0) == t.stride(1) * t.size(1);
}
Tensor with_pixel_stride(const Tensor& t) { return has_pixel_stride(t) ? t : t.contiguous(); }
// Of a tensor from there. A contiguous one may have any stride along a dimension of size 1.
int64_t pixel_stride(const Tensor& t) { return has_pixel_stride(t) ? t.stride(2) : t.size(3); }

// One call, and the tensors that its pointers lead to.
struct Call {
  dcnv3::Problem problem{};
  Tensor input, offset, mask;

  Call(const Tensor& input_, const Tensor& offset_, const Tensor& mask_, int64_t group, IntArrayRef kernel,
       IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, double offset_scale, bool remove_center,
       bool softmax)
      : input(input_.contiguous()), offset(with_pixel_stride(offset_)), mask(with_pixel_stride(mask_)) {
    const int64_t points = kernel[0] * kernel[1] - (remove_center ? 1 : 0);
    // Memory safety only, for those who call the operator directly: dcnv3.dcnv3 has said it better.
    const bool fits = input.dim() == 4 && offset.dim() == 4 && mask.dim() == 4 && group > 0 && points > 0 &&
        input.size(1) > 0 && input.size(2) > 0 && input.size(3) > 0 && input.size(3) % group == 0 &&
        offset.size(3) == group * points * 2 && mask.size(3) == group * points &&
        offset.sizes().slice(0, 3) == mask.sizes().slice(0, 3) && offset.size(0) == input.size(0) &&
        offset.scalar_type() == input.scalar_type() && mask.scalar_type() == input.scalar_type() &&
        offset.device() == input.device() && mask.device() == input.device() &&
        input.size(1) * input.size(2) < (int64_t(1) << 31);
    TORCH_CHECK_VALUE(fits, "dcnv3: shapes, dtypes or devices do not fit together; dcnv3.dcnv3 says which");

    problem.dtype = dtype_of(input);
    problem.batch = input.size(0), problem.height = input.size(1), problem.width = input.size(2);
    problem.out_height = offset.size(1), problem.out_width = offset.size(2);
    problem.group = group, problem.channels = input.size(3) / group;
    problem.offset_stride = pixel_stride(offset), problem.mask_stride = pixel_stride(mask);
    problem.kernel_h = int(kernel[0]), problem.kernel_w = int(kernel[1]);
    problem.stride_h = int(stride[0]), problem.stride_w = int(stride[1]);
    problem.padding_h = int(padding[0]), problem.padding_w = int(padding[1]);
    problem.dilation_h = int(dilation[0]), problem.dilation_w = int(dilation[1]);
    problem.offset_scale = offset_scale, problem.remove_center = remove_center, problem.softmax = softmax;
    problem.input = input.const_data_ptr();
    problem.offset = offset.const_data_ptr(), problem.mask = mask.const_data_ptr();
  }

  Tensor new_output() {
    Tensor output = at::empty({problem.batch, problem.out_height, problem.out_width, input.size(3)}, input.options());
    problem.output = output.mutable_data_ptr();
    return output;
  }
  Tensor set_grad_output(const Tensor& grad_output) {
    TORCH_CHECK_VALUE(grad_output.sizes() == IntArrayRef({problem.batch, problem.out_height, problem.out_width,
                                                          input.size(3)}) &&
                          grad_output.scalar_type() == input.scalar_type() && grad_output.device() == input.device(),
                      "dcnv3: the output gradient and the output do not fit together");
    Tensor dense = grad_output.contiguous();
    problem.grad_output = dense.const_data_ptr();
    return dense;
  }
  // Dense, of offset and mask.
  std::tuple<Tensor, Tensor> new_small_gradients() {
    Tensor grad_offset = at::empty(offset.sizes(), input.options(), at::MemoryFormat::Contiguous);
    Tensor grad_mask = at::empty(mask.sizes(), input.options(), at::MemoryFormat::Contiguous);
    problem.grad_offset = grad_offset.mutable_data_ptr(), problem.grad_mask = grad_mask.mutable_data_ptr();
    return {grad_offset, grad_mask};
  }
};

// ---- CPU --------------------------------------------------------------------------------------

using Range = void (*)(const dcnv3::Problem&, int64_t, int64_t);

// Runs `range` on parts of [0, tasks) in torch's own threads. at::parallel_for would be compiled into
// this file and needs its OpenMP flags, which differ by compiler; a TensorIterator's loop is parallel
// inside torch. It walks over a tensor that holds one number a task: the task's index. Threads are
// woken for no less than about 20 microseconds of work each.
void run_in_parallel(const dcnv3::Problem& problem, int64_t tasks, Range range) {
  const int64_t products = problem.batch * problem.out_height * problem.out_width * problem.group * problem.channels *
      problem.kernel_h * problem.kernel_w * 4;
  Tensor index = at::empty({tasks}, at::TensorOptions().dtype(at::kLong));
  int64_t* numbers = index.mutable_data_ptr<int64_t>();
  for (int64_t i = 0; i < tasks; ++i) numbers[i] = i;
  auto iterator = at::TensorIteratorConfig().check_all_same_dtype(false).resize_outputs(false).add_output(index).build();
  iterator.for_each(
      [&](char** data, const int64_t* /*strides*/, int64_t inner, int64_t outer) {
        const int64_t begin = *reinterpret_cast<const int64_t*>(data[0]);
        range(problem, begin, begin + inner * outer);
      },
      /*grain_size=*/std::max<int64_t>(1, 100000 * tasks / std::max<int64_t>(1, products)));
}

Tensor forward_cpu(const Tensor& input, const Tensor& offset, const Tensor& mask, int64_t group, IntArrayRef kernel,
                   IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, double offset_scale,
                   bool remove_center, bool softmax) {
  Call call(input, offset, mask, group, kernel, stride, padding, dilation, offset_scale, remove_center, softmax);
  Tensor output = call.new_output();
  if (output.numel() > 0) run_in_parallel(call.problem, dcnv3::cpu_forward_tasks(call.problem), dcnv3::cpu_kernels()->forward);
  return output;
}

std::tuple<Tensor, Tensor, Tensor> backward_cpu(const Tensor& grad_output, const Tensor& input, const Tensor& offset,
                                                const Tensor& mask, int64_t group, IntArrayRef kernel,
                                                IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                                                double offset_scale, bool remove_center, bool softmax) {
  Call call(input, offset, mask, group, kernel, stride, padding, dilation, offset_scale, remove_center, softmax);
  const Tensor dense = call.set_grad_output(grad_output);
  auto [grad_offset, grad_mask] = call.new_small_gradients();
  Tensor grad_input = at::empty(input.sizes(), input.options(), at::MemoryFormat::Contiguous);
  call.problem.grad_input = grad_input.mutable_data_ptr();
  if (input.numel() > 0) run_in_parallel(call.problem, dcnv3::cpu_backward_tasks(call.problem), dcnv3::cpu_kernels()->backward);
  return {grad_input, grad_offset, grad_mask};
}

#ifdef DCNV3_WITH_CUDA
// ---- CUDA -------------------------------------------------------------------------------------

void check_cuda(const char* error) {
  TORCH_CHECK(error == nullptr, "dcnv3: the CUDA kernel did not start: ", error);
}

// Null where the kernels run on this device, or why not; asked once a device.
const char* obstacle_on(c10::DeviceIndex device) {
  constexpr int most = 64;
  static std::array<std::once_flag, most> asked;
  static std::array<const char*, most> answers;
  TORCH_CHECK(device < most, "dcnv3: GPUs beyond number ", most - 1, " are not supported");
  std::call_once(asked[device], [device] { answers[device] = dcnv3::cuda_obstacle(); });
  return answers[device];
}

// The one that suits the shape, or the one that DCNV3_BACKWARD names.
dcnv3::BackwardKernel backward_kernel(const dcnv3::Problem& p) {
  const char* const asked = getenv("DCNV3_BACKWARD");
  dcnv3::BackwardKernel kernel;
  const char* const why =
      dcnv3::cuda_backward_kernel(p, asked, at::globalContext().deterministicAlgorithms(), &kernel);
  TORCH_CHECK_VALUE(why == nullptr, "dcnv3: DCNV3_BACKWARD=", asked, " does not fit an input of ", p.height, "x",
                    p.width, " pixels with ", p.channels, " channels a group: ", why,
                    "; take atomic, tiled, owning or ordered, or leave it unset");
  return kernel;
}

// The definition in PyTorch, for a GPU that cannot run the kernels: _ops.py declares both operators.
template <typename Result, typename... Arguments>
Result without_kernels(const char* name, const Arguments&... arguments) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Result(const Arguments&...)>().call(
      arguments...);
}

Tensor forward_cuda(const Tensor& input, const Tensor& offset, const Tensor& mask, int64_t group, IntArrayRef kernel,
                    IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, double offset_scale,
                    bool remove_center, bool softmax) {
  const c10::cuda::CUDAGuard guard(input.device());
  if (const char* why = obstacle_on(input.get_device()))
    return without_kernels<Tensor>("dcnv3::_forward_without_kernels", c10::string_view(why), input, offset, mask, group,
                                   kernel, stride, padding, dilation, offset_scale, remove_center, softmax);
  Call call(input, offset, mask, group, kernel, stride, padding, dilation, offset_scale, remove_center, softmax);
  Tensor output = call.new_output();
  if (output.numel() > 0)
    check_cuda(dcnv3::cuda_forward(call.problem, c10::cuda::getCurrentCUDAStream().stream()));
  return output;
}

std::tuple<Tensor, Tensor, Tensor> backward_cuda(const Tensor& grad_output, const Tensor& input, const Tensor& offset,
                                                 const Tensor& mask, int64_t group, IntArrayRef kernel,
                                                 IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                                                 double offset_scale, bool remove_center, bool softmax) {
  const c10::cuda::CUDAGuard guard(input.device());
  if (obstacle_on(input.get_device()))
    return without_kernels<std::tuple<Tensor, Tensor, Tensor>>(
        "dcnv3::_backward_without_kernels", grad_output, input, offset, mask, group, kernel, stride, padding, dilation,
        offset_scale, remove_center, softmax);
  Call call(input, offset, mask, group, kernel, stride, padding, dilation, offset_scale, remove_center, softmax);
  const Tensor dense = call.set_grad_output(grad_output);
  auto [grad_offset, grad_mask] = call.new_small_gradients();
  const auto chosen = backward_kernel(call.problem);
  Tensor grad_input;
  if (chosen == dcnv3::BackwardKernel::owning && dense.numel() > 0) {
    grad_input = at::empty(input.sizes(), input.options(), at::MemoryFormat::Contiguous);
  } else {  // sums, which become the gradient where its type is another
    const auto sums = input.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
    grad_input = at::zeros(input.sizes(), input.options().dtype(sums));
  }
  call.problem.grad_input = grad_input.mutable_data_ptr();
  if (dense.numel() > 0)
    check_cuda(dcnv3::cuda_backward(call.problem, chosen, c10::cuda::getCurrentCUDAStream().stream()));
  return {grad_input.to(input.scalar_type()), grad_offset, grad_mask};
}
#endif

}  // namespace

#ifdef DCNV3_WITH_CUDA
TORCH_LIBRARY_IMPL(dcnv3, CUDA, library) {
  library.impl("forward", forward_cuda);
  library.impl("backward", backward_cuda);
}
#endif
// What `python -m dcnv3` prints.
TORCH_LIBRARY_FRAGMENT(dcnv3, library) {
  library.def("_cpu_instruction_set() -> str", [] { return std::string(dcnv3::cpu_kernels()->name); });
}
TORCH_LIBRARY_IMPL(dcnv3, CPU, library) {
  library.impl("forward", forward_cpu);
  library.impl("backward", backward_cpu);
}
