// Activations as fixed-point digits, for integer dot products that are exact.
//
// Every 64 columns of a row share one factor: x = factor * v with an integer v, and v = 256 * high + low (two digits,
// for 16-bit floats) or v = 65536 * high + 256 * middle + low (three digits, for float32), each digit a signed byte.
// The only rounding is x to v: at most max|x| / 65200 with two digits, max|x| / 16.7 million with three, where max|x|
// is over the 64 columns. What a dot product adds after that is exact until it is scaled in float32.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>

namespace ulbq {

constexpr int64_t kChunk = 64;

enum Float : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

template <typename T>
struct Free {
    void operator()(T* memory) const { std::free(memory); }
};

// Memory on a cache line's border, not initialised.
template <typename T>
using Buffer = std::unique_ptr<T[], Free<T>>;

template <typename T>
Buffer<T> buffer(int64_t count) {
    const size_t bytes = (count * sizeof(T) + 63) / 64 * 64;
    return Buffer<T>(static_cast<T*>(std::aligned_alloc(64, bytes ? bytes : 64)));
}

inline __mmask16 first(int64_t count) { return count >= 16 ? 0xffff : count <= 0 ? 0 : (1u << count) - 1; }

// Sixteen values from `index` on; zeros where the mask is not set.
inline __m512 load_floats(const void* from, int type, int64_t index, __mmask16 mask) {
    if (type == kFloat32) return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(from) + index);
    const __m256i half = _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(from) + index);
    if (type == kFloat16) return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

// Sixteen values stored in the order given, rounded to nearest even.
inline void store_floats(void* to, int type, int64_t index, __mmask16 mask, __m512 value) {
    if (type == kFloat32) {
        _mm512_mask_storeu_ps(static_cast<float*>(to) + index, mask, value);
        return;
    }
    __m256i half;
    if (type == kFloat16) {
        half = _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    } else {
        const __m512i bits = _mm512_castps_si512(value);
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
        const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
        const __m512i kept = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
        half = _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16));
    }
    _mm256_mask_storeu_epi16(static_cast<uint16_t*>(to) + index, mask, half);
}

// 64 columns of a row in fixed point: x = factor * whole, zeros behind the last column. The largest whole is `limit`; what
// is not finite makes the factor NaN.
struct Fixed {
    Fixed(const void* x, int type, int64_t row, int64_t columns, int64_t chunk, float limit) {
        __m512 value[4], largest = _mm512_setzero_ps();
        __mmask16 strange = 0;
        for (int part = 0; part < 4; ++part) {
            const int64_t column = chunk * kChunk + part * 16;
            value[part] = load_floats(x, type, row * columns + column, first(columns - column));
            largest = _mm512_max_ps(largest, _mm512_abs_ps(value[part]));
            // x - x is zero for whatever is finite.
            const __m512 zero = _mm512_sub_ps(value[part], value[part]);
            strange |= _mm512_cmp_ps_mask(zero, zero, _CMP_UNORD_Q);
        }
        const float most = _mm512_reduce_max_ps(largest);
        const bool silent = most < 1e-30f;  // where limit / most could overflow
        factor = strange ? __builtin_nanf("") : silent ? 0.0f : most / limit;
        const __m512 inverse = _mm512_set1_ps(strange || silent ? 0.0f : limit / most);
        for (int part = 0; part < 4; ++part) {
            whole[part] = strange ? _mm512_setzero_si512() : _mm512_cvtps_epi32(_mm512_mul_ps(value[part], inverse));
        }
    }

    __m512i whole[4];
    float factor;
};

// factors, sums: [rows][units]; a unit is 64 columns, or 32 where scales change that often. `sums` are of x as rounded.
struct Units {
    Units(int64_t rows, int64_t columns, int64_t unit)
        : columns(columns), chunks((columns + kChunk - 1) / kChunk), unit(unit), units(chunks * kChunk / unit),
          factors(buffer<float>(rows * units)), sums(buffer<float>(rows * units)) {}

    void put(int64_t row, int64_t chunk, const Fixed& of) {
        const int32_t low = _mm512_reduce_add_epi32(_mm512_add_epi32(of.whole[0], of.whole[1]));
        const int32_t high = _mm512_reduce_add_epi32(_mm512_add_epi32(of.whole[2], of.whole[3]));
        if (unit == kChunk) {
            put(row, chunk, of.factor, low + high);
        } else {
            put(row, 2 * chunk, of.factor, low);
            put(row, 2 * chunk + 1, of.factor, high);
        }
    }

    const int64_t columns, chunks, unit, units;
    const Buffer<float> factors, sums;

  private:
    void put(int64_t row, int64_t index, float factor, int32_t total) {
        factors[row * units + index] = factor;
        sums[row * units + index] = factor * static_cast<float>(total);
    }
};

// Rows of activations, ready for dot products with bytes from 0 to 15.
//
// digits: [rows][Digits][chunks * 64], zeros behind the last column.
template <int Digits>
struct Activations : Units {
    static constexpr float kLimit = Digits == 2 ? 32600.0f : 8355000.0f;

    Activations(int64_t rows, int64_t columns, int64_t unit)
        : Units(rows, columns, unit), digits(buffer<int8_t>(rows * Digits * chunks * kChunk)) {}

    const int8_t* digit(int64_t row, int which) const { return digits.get() + (row * Digits + which) * chunks * kChunk; }

    // Row `from` of x; what is not finite makes a factor, and with it the row's results, NaN.
    void round_row(const void* x, int type, int64_t from, int64_t row) {
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
            const Fixed fixed(x, type, from, columns, chunk, kLimit);
            put(row, chunk, fixed);
            for (int part = 0; part < 4; ++part) store_digits(fixed.whole[part], row, chunk * kChunk + part * 16);
        }
    }

    const Buffer<int8_t> digits;

  private:
    void store_digits(__m512i whole, int64_t row, int64_t column) {
        __m512i rest = whole;
        for (int which = Digits - 1; which > 0; --which) {
            // The nearest multiple of 256 leaves a digit from -128 to 127.
            const __m512i above = _mm512_srai_epi32(_mm512_add_epi32(rest, _mm512_set1_epi32(128)), 8);
            put_bytes(_mm512_sub_epi32(rest, _mm512_slli_epi32(above, 8)), row, which, column);
            rest = above;
        }
        put_bytes(rest, row, 0, column);
    }

    void put_bytes(__m512i value, int64_t row, int which, int64_t column) {
        int8_t* to = digits.get() + (row * Digits + which) * chunks * kChunk + column;
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(value));
    }
};

}  // namespace ulbq
