// Products of a few vectors with codes of a byte each: kernels/byte_codes.py says how they lie.
#include <omp.h>

#include "vectors.h"

using namespace ulbq;

namespace {

// `rows` vectors with one row of the matrix; a code less its zero point is a small integer, exact in float32.
template <int rows>
void dot(const uint8_t* codes, const uint16_t* scales, const uint8_t* zeros, float centre, int64_t columns,
         int64_t group, const float* x, float* y, int64_t stride) {
    __m512 total[rows] = {};
    for (int64_t start = 0, index = 0; start < columns; start += group, ++index) {
        const __m512 zero = all(zeros ? zeros[index] : centre);
        __m512 sum[rows] = {};
        for (int64_t i = start; i < start + group; i += 16) {
            const int64_t left = start + group - i;
            const __mmask16 mask = left < 16 ? (1u << left) - 1 : 0xFFFF;
            const __m512i wide = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, codes + i));
            const __m512 steps = _mm512_sub_ps(_mm512_cvtepi32_ps(wide), zero);
            for (int row = 0; row < rows; ++row) {
                sum[row] = _mm512_fmadd_ps(steps, load(x + row * columns + i, mask), sum[row]);
            }
        }
        const __m512 scale = all(_cvtsh_ss(scales[index]));
        for (int row = 0; row < rows; ++row) total[row] = _mm512_fmadd_ps(sum[row], scale, total[row]);
    }
    for (int row = 0; row < rows; ++row) y[row * stride] = _mm512_reduce_add_ps(total[row]);
}

}  // namespace

// codes [outs][columns], scales float16 [outs][groups], zeros [outs][groups] or none; x [rows][columns], y [rows][outs].
extern "C" void ulbq_multiply_bytes(const uint8_t* codes, const uint16_t* scales, const uint8_t* zeros, float centre,
                                    int64_t outs, int64_t columns, int64_t group, const float* x, int64_t rows,
                                    float* y, int threads) {
    const int64_t groups = columns / group;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t out = 0; out < outs; ++out) {
        const uint8_t* own = zeros ? zeros + out * groups : nullptr;
        const auto run = [&](auto count, int64_t row) {
            dot<decltype(count)::value>(codes + out * columns, scales + out * groups, own, centre, columns, group,
                                        x + row * columns, y + row * outs + out, outs);
        };
        int64_t row = 0;
        for (; row + 4 <= rows; row += 4) run(std::integral_constant<int, 4>(), row);
        for (; row < rows; ++row) run(std::integral_constant<int, 1>(), row);
    }
}
