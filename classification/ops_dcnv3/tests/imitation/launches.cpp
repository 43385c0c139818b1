// How the kernels would be started, without running them: for every level of InternImage-B at 224 pixels, batch
// 32, one line a kernel, `kernel|dtype|height|blocks|shared bytes of a block`. Then, from running them, what they
// add to memory in an image of the first two levels whose offsets are drawn N(0, spread) pixels, one line a kernel,
// `kernel|height|spread|additions of a row of channels, of an output pixel and group`. count.py reads both.
#include "cuda_kernels.cpp"

static dcnv3::Problem level(dcnv3::Dtype dtype, int64_t size, int64_t group) {
  static char memory[64];
  void* const somewhere = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(memory) + 15) / 16 * 16);
  dcnv3::Problem p{};
  p.dtype = dtype, p.batch = 32, p.height = p.width = p.out_height = p.out_width = size;
  p.group = group, p.channels = 16, p.offset_stride = group * 18, p.mask_stride = group * 9;
  p.kernel_h = p.kernel_w = 3, p.stride_h = p.stride_w = p.padding_h = p.padding_w = p.dilation_h = p.dilation_w = 1;
  p.offset_scale = 1;
  p.input = p.offset = p.mask = p.grad_output = somewhere;
  p.output = p.grad_input = p.grad_offset = p.grad_mask = somewhere;
  return p;
}

// Rows of channels, however many these are: here four, for which no thread waits for another.
static double additions(dcnv3::BackwardKernel kernel, int size, double spread) {
  const size_t pixels = size_t(size) * size;
  std::mt19937 random(1);
  std::normal_distribution<float> normal(0, 1);
  std::vector<float> input(pixels * 4, 1), offset(pixels * 18), mask(pixels * 9, 1), sums(pixels * 4);
  std::vector<float> grad_offset(pixels * 18), grad_mask(pixels * 9);
  for (float& number : offset) number = float(spread) * normal(random);
  dcnv3::Problem p = level(dcnv3::Dtype::float32, size, 1);
  p.batch = 1, p.channels = 4, p.input = p.grad_output = input.data(), p.offset = offset.data(), p.mask = mask.data();
  p.grad_input = sums.data(), p.grad_offset = grad_offset.data(), p.grad_mask = grad_mask.data();
  emulated::added = 0;
  dcnv3::cuda_backward(p, kernel, nullptr);
  return emulated::added / 4.0 / double(pixels);
}

int main() {
  static const char* line;
  emulated::told = [](unsigned blocks, size_t bytes) { printf("%s|%u|%zu\n", line, blocks, bytes); };
  const struct { dcnv3::Dtype dtype; const char* name; } dtypes[] = {
      {dcnv3::Dtype::bfloat16, "bfloat16"}, {dcnv3::Dtype::float32, "float32"}, {dcnv3::Dtype::float64, "float64"}};
  for (const auto& type : dtypes) {
    for (int i = 0; i < 4; ++i) {
      const dcnv3::Problem p = level(type.dtype, 56 >> i, 7 << i);
      const auto tell = [&](const char* kernel) {
        static char text[64];
        snprintf(text, sizeof(text), "%s|%s|%d", kernel, type.name, 56 >> i);
        line = text;
      };
      tell("forward"), dcnv3::cuda_forward(p, nullptr);
      tell("atomic"), dcnv3::cuda_backward(p, dcnv3::BackwardKernel::atomic, nullptr);
      dcnv3::BackwardKernel suits;
      dcnv3::cuda_backward_kernel(p, nullptr, false, &suits);
      tell("by shape"), dcnv3::cuda_backward(p, suits, nullptr);
      const auto both = [&](const char* tiled, const char* owning) {
        tell(tiled), dcnv3::cuda_backward(p, dcnv3::BackwardKernel::tiled, nullptr);
        if (owning && dcnv3::owning_fits(p)) tell(owning), dcnv3::cuda_backward(p, dcnv3::BackwardKernel::owning, nullptr);
      };
      if (dcnv3::dense_fits(p, false)) both("dense tiled", dcnv3::dense_fits(p, true) ? "dense owning" : nullptr);
      emulated::attributes[0] = 7;  // without the tensor cores of sm_80
      both("tiled", "owning");
      emulated::attributes[1] = 100 * 1024;
      both("tiled, 100 KB", "owning, 100 KB");
      emulated::attributes[0] = 8, emulated::attributes[1] = 164 * 1024;
    }
  }
  // The choice of a kernel for every shape, deterministic or not.
  for (int bits = 0; bits < 32; ++bits) {
    const auto bit = [bits](int i) { return (bits >> i & 1) != 0; };
    const dcnv3::Shape shape{bit(0) || bit(1), bit(1), bit(2), bit(3)};
    const char* const names[] = {"atomic", "tiled", "owning", "ordered"};
    printf("%d|%d|%d|%d|%d|%s\n", shape.owning_fits, shape.owning_pays, shape.tiled_pays, bit(3), bit(4),
           names[int(dcnv3::suited_kernel(shape, bit(4)))]);
  }
  emulated::told = nullptr;
  for (int size : {56, 28})
    for (double spread : {0., 1., 2., 4.})
      for (const auto kernel : {dcnv3::BackwardKernel::atomic, dcnv3::BackwardKernel::tiled})
        printf("%s|%d|%g|%.6f\n", kernel == dcnv3::BackwardKernel::tiled ? "tiled" : "atomic", size, spread,
               additions(kernel, size, spread));
}
