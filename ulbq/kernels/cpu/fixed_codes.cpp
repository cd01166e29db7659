// Codes that are decided: bit planes to the weight, and its gradient to scales and zero points, one pass each.
//
// Eight codes lie in a byte of a plane, so that sixteen bits are a mask of sixteen lanes. Values come from the same
// roundings in the same order as in torch; sums alone are added up in another order.

#include <cstring>

#include <omp.h>

#include "vectors.h"

namespace ulbq {

struct Planes {
    const uint8_t* data;
    int64_t count, rows, groups, size;  // planes, and in each: rows, groups of a row, codes of a group

    // Sixteen codes of a plane; `at` is a code of the row and a multiple of sixteen.
    __mmask16 bits(int64_t plane, int64_t row, int64_t at) const {
        uint16_t found;
        std::memcpy(&found, data + ((plane * rows + row) * groups * size + at) / 8, sizeof found);
        return found;
    }
    __m512 code(int64_t row, int64_t at) const {
        __m512 sum = _mm512_setzero_ps();
        for (int64_t plane = 0; plane < count; ++plane) {
            sum = plus(sum, _mm512_maskz_mov_ps(bits(plane, row, at), all(float(1 << plane))));
        }
        return sum;
    }
};

}  // namespace ulbq

using namespace ulbq;

// Without zero points each plane has scales of its own, [count][rows][groups], and the weight is their sum; with them,
// [rows][groups], it is scale * (code - zero), the planes being a code's bits.
extern "C" void ulbq_fixed(const uint8_t* data, int64_t count, int64_t rows, int64_t groups, int64_t size,
                           const float* scales, const float* zeros, void* to, int type, int threads) {
    const Planes planes{data, count, rows, groups, size};
    by_type(type, [&](auto float_type) {
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int64_t row = 0; row < rows; ++row) {
            for (int64_t group = 0; group < groups; ++group) {
                const int64_t place = row * groups + group;
                for (int64_t at = group * size; at < (group + 1) * size; at += 16) {
                    __m512 weight;
                    if (zeros) {
                        weight = times(minus(planes.code(row, at), all(zeros[place])), all(scales[place]));
                    } else {
                        weight = _mm512_setzero_ps();
                        for (int64_t plane = 0; plane < count; ++plane) {
                            const __m512 scale = all(scales[plane * rows * groups + place]);
                            weight = plus(weight, times(ones(planes.bits(plane, row, at)), scale));
                        }
                    }
                    store_floats(to, decltype(float_type)::value, row * groups * size + at, 0xffff, weight);
                }
            }
        }
    });
}

// Gradients of the weight in the given type to those of the scales, as they lie, and of the zero points, which may be
// null.
extern "C" void ulbq_fixed_back(const uint8_t* data, int64_t count, int64_t rows, int64_t groups, int64_t size,
                                const float* scales, const float* zeros, const void* gradients, int type,
                                float* to_scales, float* to_zeros, int threads) {
    const Planes planes{data, count, rows, groups, size};
    by_type(type, [&](auto float_type) {
        const auto load = [&](int64_t row, int64_t at) {
            return load_floats(gradients, decltype(float_type)::value, row * groups * size + at, 0xffff);
        };
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int64_t row = 0; row < rows; ++row) {
            for (int64_t group = 0; group < groups; ++group) {
                const int64_t place = row * groups + group;
                for (int64_t plane = 0; plane < (zeros ? 1 : count); ++plane) {
                    __m512 sum = _mm512_setzero_ps(), whole = _mm512_setzero_ps();
                    for (int64_t at = group * size; at < (group + 1) * size; at += 16) {
                        const __m512 gradient = load(row, at);
                        const __m512 level = zeros ? minus(planes.code(row, at), all(zeros[place]))
                                                   : ones(planes.bits(plane, row, at));
                        sum = plus(sum, times(level, gradient));
                        whole = plus(whole, gradient);
                    }
                    to_scales[plane * rows * groups + place] = _mm512_reduce_add_ps(sum);
                    if (to_zeros) to_zeros[place] = -_mm512_reduce_add_ps(whole) * scales[place];
                }
            }
        }
    });
}
