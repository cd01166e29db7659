// Sixteen float32 values at a time: arithmetic whose roundings are as written, and the exponential function.
#pragma once

#include <initializer_list>
#include <type_traits>

#include "activations.h"

namespace ulbq {

constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;

// With their rounding spelt out, a compiler does not make one fused operation of two, whose result may be another.
inline __m512 times(__m512 a, __m512 b) { return _mm512_mul_round_ps(a, b, kNearest); }
inline __m512 plus(__m512 a, __m512 b) { return _mm512_add_round_ps(a, b, kNearest); }
inline __m512 minus(__m512 a, __m512 b) { return _mm512_sub_round_ps(a, b, kNearest); }
inline __m512 all(float value) { return _mm512_set1_ps(value); }
// To multiply by: where it is 0, what is not finite stays so, and shows.
inline __m512 ones(__mmask16 mask) { return _mm512_maskz_mov_ps(mask, all(1.0f)); }
inline __m512 load(const float* from, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, from); }

// e^x to two units in the last place; 0 below the smallest normal number, infinity above the largest, NaN of NaN.
inline __m512 exponential(__m512 x) {
    const __m512 bounded = _mm512_min_ps(all(89.0f), _mm512_max_ps(all(-88.0f), x));
    const __m512 whole = _mm512_roundscale_ps(_mm512_mul_ps(bounded, all(1.44269504f)), kNearest);
    // ln 2 in two parts, so that the rest is exact.
    const __m512 rest = _mm512_fnmadd_ps(whole, all(-2.12194440e-4f), _mm512_fnmadd_ps(whole, all(0.693359375f), bounded));
    __m512 sum = all(1.9875691500e-4f);
    for (const float factor : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) {
        sum = _mm512_fmadd_ps(sum, rest, all(factor));
    }
    sum = _mm512_fmadd_ps(sum, _mm512_mul_ps(rest, rest), _mm512_add_ps(rest, all(1.0f)));
    const __mmask16 above = _mm512_cmp_ps_mask(x, all(-87.3365f), _CMP_NLT_UQ);
    return _mm512_maskz_scalef_ps(above, sum, whole);
}

// 1 / x to two units in the last place, 0 for infinity.
inline __m512 inverse(__m512 x) {
    const __m512 near = _mm512_rcp14_ps(x);
    const __mmask16 finite = _mm512_cmp_ps_mask(x, all(__builtin_inff()), _CMP_NEQ_UQ);
    return _mm512_maskz_mul_ps(finite, near, _mm512_fnmadd_ps(x, near, all(2.0f)));
}

// As `store_floats`, but by the processor's own rounding to bfloat16 where it has one, which takes the smallest numbers
// (of less than 2^-126) for zeros.
inline void store_rounded(void* to, int type, int64_t index, __mmask16 mask, __m512 value) {
#ifdef __AVX512BF16__
    if (type == kBFloat16) {
        _mm256_mask_storeu_epi16(static_cast<uint16_t*>(to) + index, mask, (__m256i)_mm512_cvtneps_pbh(value));
        return;
    }
#endif
    store_floats(to, type, index, mask, value);
}

// `run` with the type of 16-bit or 32-bit floats as a constant.
template <class Run>
inline void by_type(int type, const Run& run) {
    if (type == kFloat32) return run(std::integral_constant<int, kFloat32>());
    if (type == kFloat16) return run(std::integral_constant<int, kFloat16>());
    run(std::integral_constant<int, kBFloat16>());
}

}  // namespace ulbq
