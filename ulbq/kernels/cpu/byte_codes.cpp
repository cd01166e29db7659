// Products of a few vectors with codes of a byte each: kernels/byte_codes.py says how they lie.
#include <omp.h>

#include "linear.h"

namespace ulbq {

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

// One output of an input in fixed point, 64 columns at a time, which have one scale.
template <int Digits>
float dot(const uint8_t* codes, const uint16_t* scales, const uint8_t* zeros, float centre, int64_t group,
          const Activations<Digits>& x) {
    __m512 total = _mm512_setzero_ps();
    float offset = 0.0f;
    for (int64_t start = 0, index = 0; start < x.columns; start += group, ++index) {
        const float scale = _cvtsh_ss(scales[index]), zero = zeros ? zeros[index] : centre;
        for (int64_t i = start; i < start + group; i += kChunk) {
            const int64_t left = x.columns - i, chunk = i / kChunk;
            const __m512i own = _mm512_maskz_loadu_epi8(left < kChunk ? (1ull << left) - 1 : ~0ull, codes + i);
            const auto digit = [&](__m512i before, int which) {
                return _mm512_dpbusd_epi32(before, own, _mm512_loadu_si512(x.digit(0, which) + i));
            };
            // Two digits fit into 32 bits together, three do not.
            const __m512i high = _mm512_slli_epi32(digit(_mm512_setzero_si512(), 0), 8);
            __m512 sum = _mm512_cvtepi32_ps(digit(high, 1));
            if (Digits == 3) {
                sum = _mm512_fmadd_ps(sum, all(256.0f), _mm512_cvtepi32_ps(digit(_mm512_setzero_si512(), 2)));
            }
            total = _mm512_fmadd_ps(sum, all(scale * x.factors[chunk]), total);
            offset += scale * zero * x.sums[chunk];
        }
    }
    return _mm512_reduce_add_ps(total) - offset;
}

// One row.
template <int Digits>
struct BytesLinear : Linear {
    BytesLinear(const uint8_t* codes, const uint16_t* scales, const uint8_t* zeros, float centre, int64_t outs,
                int64_t columns, int64_t group, const float* bias)
        : Linear(outs, columns, bias), codes(codes), scales(scales), zeros(zeros), centre(centre), group(group) {}

    void multiply(const float* x, float* y, Own& own, float*) const override {
        const int64_t groups = columns / group;
        const auto each = [&](const auto& one) {
            share((outs + 15) / 16, [&](int64_t piece) {
                alignas(64) float found[16];
                for (int64_t out = piece * 16; out < outs && out < piece * 16 + 16; ++out) {
                    const uint8_t* of_row = zeros ? zeros + out * groups : nullptr;
                    found[out % 16] = one(codes + out * columns, scales + out * groups, of_row);
                }
                put(y, piece * 16, _mm512_load_ps(found));
            });
        };
        if (group % kChunk == 0 || group == columns) {
            const auto& rounded = own.rounded<Activations<Digits>>(x, columns, kChunk);
            return each([&](const auto*... row) { return dot<Digits>(row..., centre, group, rounded); });
        }
        each([&](const auto*... row) {
            float found;
            dot<1>(row..., centre, columns, group, x, &found, 1);
            return found;
        });
    }

  private:
    const uint8_t* const codes;
    const uint16_t* const scales;
    const uint8_t* const zeros;
    const float centre;
    const int64_t group;
};

}  // namespace ulbq

using namespace ulbq;

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

// A matrix for ulbq_decode; `exact` rounds inputs to three digits, not two.
extern "C" void ulbq_bytes_linear(const uint8_t* codes, const uint16_t* scales, const uint8_t* zeros, float centre,
                                  int64_t outs, int64_t columns, int64_t group, const float* bias, int exact,
                                  const Linear** made) {
    if (exact) {
        *made = new BytesLinear<3>(codes, scales, zeros, centre, outs, columns, group, bias);
    } else {
        *made = new BytesLinear<2>(codes, scales, zeros, centre, outs, columns, group, bias);
    }
}
