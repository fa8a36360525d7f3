// Linked in place of the .cu files where CUDA is not compiled.
#include "../kernels.h"

namespace moekern::cuda {

std::string architectures() { return ""; }
int device_count() { return 0; }

}  // namespace moekern::cuda
