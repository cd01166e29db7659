// GPTQ's loop over the columns of one block, affine grids: solvers/gptq.py says what is computed.
//
// Rows know nothing of each other. Some rows at a time, the block lies in the nearest cache from its first column to its
// last. Columns come transposed, so that the rows of a strip are the lanes of a register.

#include <omp.h>

#include <atomic>
#include <vector>

#include "affine.h"

namespace ulbq {

constexpr int64_t kStrip = 32;  // rows

using Strip = float[kStrip];

inline void round(const Strip& column, const Strip& scales, const Strip& zeros, float pivot, float top, Strip& error,
                  uint8_t (&codes)[kStrip]) {
    for (int64_t row = 0; row < kStrip; ++row) {
        const float marked = clamp(column[row] / scales[row] + zeros[row], top) + kMagic;
        codes[row] = static_cast<uint8_t>(bits_of(marked));
        error[row] = (column[row] - ((marked - kMagic) - zeros[row]) * scales[row]) / pivot;
    }
}

inline void make_good(Strip* later, const float* factors, int64_t count, const Strip& error) {
    for (int64_t column = 0; column < count; ++column) {
        const float factor = factors[column];
        for (int64_t row = 0; row < kStrip; ++row) later[column][row] -= factor * error[row];
    }
}

}  // namespace ulbq

using namespace ulbq;

// Quantize a block [columns][rows], in place: each column is left as it was when its turn came.
//
// upper: the factor's diagonal block. groups: of each column. scales, zeros [groups][rows]: grids, which are looked for
// when a group's first column comes where there are factors to try; columns of a group then lie side by side, and
// importance is that of the block's. codes, errors [columns][rows]; losses [rows / 32, rounded up] sums of squared errors.
extern "C" void ulbq_compensate(float* values, int64_t rows, int64_t columns, const float* upper, int64_t upper_stride,
                                const int64_t* groups, float* scales, float* zeros, const float* importance,
                                int64_t size, float floor, float top, float centre, const float* factors, int64_t count,
                                uint8_t* codes, float* errors, double* losses, int* failed, int threads) {
    const int64_t strips = (rows + kStrip - 1) / kStrip;
    std::atomic<bool> bad{false};
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> buffer(columns * kStrip), group(size);
        Strip* block = reinterpret_cast<Strip*>(buffer.data());
        Finder finder({top, centre, floor, factors, count});
#pragma omp for schedule(static)
        for (int64_t strip = 0; strip < strips; ++strip) {
            const int64_t first = strip * kStrip, own = std::min(kStrip, rows - first);
            for (int64_t column = 0; column < columns; ++column) {
                std::memcpy(block[column], values + column * rows + first, own * sizeof(float));
            }
            double loss = 0;
            for (int64_t column = 0; column < columns; ++column) {
                float* group_scales = scales + groups[column] * rows + first;
                float* group_zeros = zeros + groups[column] * rows + first;
                if (count && (column == 0 || groups[column] != groups[column - 1])) {
                    for (int64_t row = 0; row < own; ++row) {
                        for (int64_t i = 0; i < size; ++i) group[i] = block[column + i][row];
                        const Grid found = finder.find(group.data(), importance + column, size);
                        group_scales[row] = found.scale;
                        group_zeros[row] = found.zero;
                        if (!(found.error < std::numeric_limits<float>::infinity())) bad = true;
                    }
                }
                Strip scale, zero, error;
                uint8_t code[kStrip];
                for (int64_t row = 0; row < kStrip; ++row) {
                    scale[row] = row < own ? group_scales[row] : 1;
                    zero[row] = row < own ? group_zeros[row] : 0;
                }
                const float* factor = upper + column * upper_stride + column;
                round(block[column], scale, zero, *factor, top, error, code);
                make_good(block + column + 1, factor + 1, columns - column - 1, error);
                std::memcpy(values + column * rows + first, block[column], own * sizeof(float));
                std::memcpy(errors + column * rows + first, error, own * sizeof(float));
                std::memcpy(codes + column * rows + first, code, own);
                for (int64_t row = 0; row < own; ++row) loss += static_cast<double>(error[row]) * error[row];
            }
            losses[strip] = loss;
        }
    }
    *failed = bad;
}
