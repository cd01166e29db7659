// Floats side by side in the widest registers of the machine, and the roundings that all solvers share.
//
// Plain C++ with vector types, which g++ and clang++ turn into the instructions of any processor. Nothing here may be
// contracted or reassociated: what is rounded has to be what torch rounds.

#pragma once

#include <cstdint>
#include <cstring>

namespace ulbq {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

constexpr int kLanes = 16;  // handled together whatever the machine, so that sums come out the same on all
constexpr int kParts = kLanes / kWidth;
constexpr int64_t kSum = 64;  // elements that are summed by themselves, to keep rounding small in long groups

typedef float Floats __attribute__((vector_size(4 * kWidth)));

inline Floats load(const float* from) {
    Floats values;
    std::memcpy(&values, from, sizeof values);
    return values;
}

inline void store(float* to, const Floats& values) { std::memcpy(to, &values, sizeof values); }

inline Floats spread(float value) { return value - Floats{}; }

template <typename T>
inline T least(const T& a, const T& b) { return a < b ? a : b; }

template <typename T>
inline T largest(const T& a, const T& b) { return a > b ? a : b; }

// Added to a float between -2^22 and 2^22 it leaves the nearest integer, halves to even, in the lowest bits.
constexpr float kMagic = 12582912.0f;

// A float between 0 and top rounded to an integer. Clamped first, which comes to the same: both ends are integers.
template <typename T>
inline T clamp(const T& value, const T& top) { return least(largest(value, T{}), top); }

inline uint32_t bits_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

// A positive scale rounded to float16 as it will be stored, but no less than the floor.
inline float storable(float scale, float floor) {
    const uint32_t bits = bits_of(scale);
    const uint32_t even = (bits + 0xFFF + (bits >> 13 & 1)) & ~0x1FFFu;
    float rounded;
    std::memcpy(&rounded, &even, sizeof rounded);
    if (rounded > 65504.0f) rounded = __builtin_inff();
    if (scale < 0x1p-14f) rounded = (scale + 0.5f) - 0.5f;  // subnormal: multiples of 2^-24
    return rounded < floor ? floor : rounded;
}

}  // namespace ulbq
