// Fake quantization for training: latents to the dequantized weight, and its gradient back to what trains.
//
// Latents are float32 [groups][size], in grid steps; everything else has one value a group. What torch's operations do
// in a dozen passes over memory is one here. Each value comes from the same roundings in the same order as there, so
// that codes at the border of two cells are the same; sums alone are added up in another order. On the way back codes
// are made anew, which costs less than to write and read them.

#include <omp.h>

#include "vectors.h"

namespace ulbq {

// One group of a dual-binary matrix: levels 0, first, second and their sum.
struct DualBinary {
    DualBinary(const float* scales, const float* steps, int64_t groups, int64_t group)
        : first(scales[group]), second(scales[groups + group]), step(steps[group]) {}

    struct Sums {
        __m512 first = _mm512_setzero_ps(), second = _mm512_setzero_ps();
    };

    __mmask16 upper(__m512 latent) const { return _mm512_cmp_ps_mask(latent, all((first + second) / 2), _CMP_GT_OQ); }
    __mmask16 lower(__m512 latent, __mmask16 upper) const {
        const __m512 border = plus(all(second / 2), times(ones(upper), all(first)));
        return _mm512_cmp_ps_mask(latent, border, _CMP_LT_OQ);
    }
    __m512 weight(__m512 latent) const {
        const __mmask16 above = upper(latent);
        return plus(times(ones(above), all(first * step)), times(ones(lower(latent, above)), all(second * step)));
    }
    // The gradient of the latents.
    __m512 back(__m512 latent, __m512 gradient, Sums& sums) const {
        const __mmask16 above = upper(latent), below = lower(latent, above);
        const __m512 scaled = times(gradient, all(step));
        sums.first = plus(sums.first, times(scaled, ones(above)));
        sums.second = plus(sums.second, times(scaled, ones(below)));
        const __mmask16 inside = _mm512_cmp_ps_mask(latent, all(1.5f * second), _CMP_GT_OQ) &
                                 _mm512_cmp_ps_mask(latent, all(first - second / 2), _CMP_LT_OQ);
        return times(scaled, ones(inside));
    }

    const float first, second, step;
};

// One group of an affine matrix: scale * (code - zero).
struct Affine {
    Affine(const float* scales, const float* zeros, const float* steps, float top, int64_t group)
        : scale(scales[group]), zero(zeros[group]), step(steps[group]), inverse(1.0f / scale), top(top) {}

    struct Sums {
        __m512 levels = _mm512_setzero_ps(), latents = _mm512_setzero_ps(), outside = _mm512_setzero_ps();
    };

    __m512 rounded(__m512 latent) const {
        const __m512 place = plus(times(latent, all(inverse)), all(zero));
        return _mm512_roundscale_ps(place, kNearest);
    }
    // NaN comes out as NaN: of two operands the second is what is left where one is not a number.
    __m512 code(__m512 rounded) const { return _mm512_min_ps(all(top), _mm512_max_ps(_mm512_setzero_ps(), rounded)); }
    __m512 weight(__m512 latent) const { return times(minus(code(rounded(latent)), all(zero)), all(scale * step)); }
    __m512 back(__m512 latent, __m512 gradient, Sums& sums) const {
        const __m512 beyond = rounded(latent), kept = code(beyond);
        const __m512 outside = _mm512_min_ps(all(1.0f), _mm512_abs_ps(minus(beyond, kept)));
        const __m512 scaled = times(gradient, all(step));
        const __m512 lost = times(outside, scaled), passed = minus(scaled, lost);
        sums.levels = plus(sums.levels, times(minus(kept, all(zero)), scaled));
        sums.latents = plus(sums.latents, times(passed, latent));
        sums.outside = plus(sums.outside, lost);
        return passed;
    }

    const float scale, zero, step, inverse, top;
};

template <int Type, class Group>
inline void forward(const Group& group, const float* latents, int64_t begin, int64_t size, void* to) {
    int64_t at = begin;
    for (; at + 16 <= begin + size; at += 16) store_floats(to, Type, at, 0xffff, group.weight(load(latents + at, 0xffff)));
    const __mmask16 rest = first(begin + size - at);
    if (rest) store_floats(to, Type, at, rest, group.weight(load(latents + at, rest)));
}

template <int Type, class Group>
inline typename Group::Sums backward(const Group& group, const float* latents, int64_t begin, int64_t size,
                                     const void* gradients, float* to_latents) {
    typename Group::Sums sums;
    for (int64_t at = begin; at < begin + size; at += 16) {
        // Beyond the group's end gradients are zero, so that nothing is added to the sums.
        const __mmask16 mask = first(begin + size - at);
        const __m512 passed = group.back(load(latents + at, mask), load_floats(gradients, Type, at, mask), sums);
        if (to_latents) _mm512_mask_storeu_ps(to_latents + at, mask, passed);
    }
    return sums;
}

}  // namespace ulbq

using namespace ulbq;

// Scales [2][groups], steps [groups]; `to` [groups][size] in the given type.
extern "C" void ulbq_fake_dual_binary(const float* latents, const float* scales, const float* steps, int64_t groups,
                                      int64_t size, void* to, int type, int threads) {
    by_type(type, [&](auto float_type) {
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int64_t group = 0; group < groups; ++group) {
            forward<decltype(float_type)::value>(DualBinary(scales, steps, groups, group), latents, group * size, size, to);
        }
    });
}

// Gradients [groups][size] in the given type; `to_latents` [groups][size] may be null, `to_scales` is [2][groups].
extern "C" void ulbq_fake_dual_binary_back(const float* latents, const float* scales, const float* steps, int64_t groups,
                                           int64_t size, const void* gradients, int type, float* to_latents,
                                           float* to_scales, int threads) {
    by_type(type, [&](auto float_type) {
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int64_t group = 0; group < groups; ++group) {
            const DualBinary one(scales, steps, groups, group);
            const auto sums = backward<decltype(float_type)::value>(one, latents, group * size, size, gradients, to_latents);
            to_scales[group] = _mm512_reduce_add_ps(sums.first);
            to_scales[groups + group] = _mm512_reduce_add_ps(sums.second);
        }
    });
}

// Scales, zeros and steps [groups]; `to` [groups][size] in the given type.
extern "C" void ulbq_fake_affine(const float* latents, const float* scales, const float* zeros, const float* steps,
                                 float top, int64_t groups, int64_t size, void* to, int type, int threads) {
    by_type(type, [&](auto float_type) {
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int64_t group = 0; group < groups; ++group) {
            forward<decltype(float_type)::value>(Affine(scales, zeros, steps, top, group), latents, group * size, size, to);
        }
    });
}

// Gradients [groups][size] in the given type; `to_latents` [groups][size] and `to_zeros` [groups] may be null.
extern "C" void ulbq_fake_affine_back(const float* latents, const float* scales, const float* zeros, const float* steps,
                                      float top, int64_t groups, int64_t size, const void* gradients, int type,
                                      float* to_latents, float* to_scales, float* to_zeros, int threads) {
    by_type(type, [&](auto float_type) {
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int64_t group = 0; group < groups; ++group) {
            const Affine one(scales, zeros, steps, top, group);
            const auto sums = backward<decltype(float_type)::value>(one, latents, group * size, size, gradients, to_latents);
            // Inside, q - u is q - z less w / s, and outside nothing is left of the gradient to the latent.
            to_scales[group] = _mm512_reduce_add_ps(sums.levels) - _mm512_reduce_add_ps(sums.latents) / one.scale;
            if (to_zeros) to_zeros[group] = -_mm512_reduce_add_ps(sums.outside) * one.scale;
        }
    });
}

// Scales and zero points [groups] of clip ends [2][groups]; no scale below the least.
extern "C" void ulbq_affine_grid(const float* ends, float least, float top, int64_t groups, float* scales, float* zeros) {
    for (int64_t at = 0; at < groups; at += 16) {
        const __mmask16 mask = first(groups - at);
        const __m512 low = load(ends + at, mask), high = load(ends + groups + at, mask);
        // Of two operands the second is what is left where one is not a number.
        const __m512 scale = _mm512_max_ps(all(least), _mm512_div_ps(minus(high, low), all(top)));
        const __m512 place = _mm512_roundscale_ps(_mm512_div_ps(minus(all(-0.0f), low), scale), kNearest);
        _mm512_mask_storeu_ps(scales + at, mask, scale);
        _mm512_mask_storeu_ps(zeros + at, mask, _mm512_min_ps(all(top), _mm512_max_ps(_mm512_setzero_ps(), place)));
    }
}

// Gradients of the ends [2][groups] from those of scales and zero points.
extern "C" void ulbq_affine_grid_back(const float* ends, float least, float top, int64_t groups, const float* of_scales,
                                      const float* of_zeros, float* to_ends) {
    for (int64_t at = 0; at < groups; at += 16) {
        const __mmask16 mask = first(groups - at);
        const __m512 low = load(ends + at, mask), high = load(ends + groups + at, mask);
        const __m512 raw = _mm512_div_ps(minus(high, low), all(top)), scale = _mm512_max_ps(all(least), raw);
        const __m512 exact = _mm512_div_ps(minus(all(-0.0f), low), scale), place = _mm512_roundscale_ps(exact, kNearest);
        // Rounding lets gradients through, limits do not.
        const __mmask16 within = _mm512_cmp_ps_mask(place, _mm512_setzero_ps(), _CMP_GE_OQ) & _mm512_cmp_ps_mask(place, all(top), _CMP_LE_OQ);
        const __m512 shift = _mm512_div_ps(_mm512_maskz_loadu_ps(mask & within, of_zeros + at), scale);
        const __m512 whole = _mm512_fnmadd_ps(shift, exact, load(of_scales + at, mask));
        const __m512 span = _mm512_maskz_div_ps(_mm512_cmp_ps_mask(raw, all(least), _CMP_GE_OQ), whole, all(top));
        _mm512_mask_storeu_ps(to_ends + at, mask, minus(minus(all(-0.0f), span), shift));
        _mm512_mask_storeu_ps(to_ends + groups + at, mask, span);
    }
}
