// Rounding to nearest with a search for every group's range: solvers/rtn.py says what is looked for.

#include <omp.h>

#include <atomic>
#include <vector>

#include "affine.h"

using namespace ulbq;

// Weights lie at row * row_stride + column * column_stride; a group is gathered first where it is not in one piece.
// codes [rows][columns], scales and zeros [rows][groups]; failed is set where a group has no error that is a number.
extern "C" void ulbq_round_to_nearest(const float* weights, int64_t rows, int64_t columns, int64_t row_stride,
                                      int64_t column_stride, const float* importance, int64_t size, float floor,
                                      float top, float centre, const float* factors, int64_t count, uint8_t* codes,
                                      float* scales, float* zeros, int* failed, int threads) {
    const Search search{top, centre, floor, factors, count};
    const int64_t groups = columns / size;
    constexpr int64_t kRows = 16;  // that share cache lines where columns lie in one piece
    std::atomic<bool> bad{false};
#pragma omp parallel num_threads(threads)
    {
        Finder finder(search);
        std::vector<float> gathered(column_stride == 1 ? 0 : size);
#pragma omp for schedule(dynamic, 1)
        for (int64_t first = 0; first < rows; first += kRows) {
            for (int64_t group = 0; group < groups; ++group) {
                for (int64_t row = first; row < std::min(first + kRows, rows); ++row) {
                    const float* values = weights + row * row_stride + group * size * column_stride;
                    if (column_stride != 1) {
                        for (int64_t i = 0; i < size; ++i) gathered[i] = values[i * column_stride];
                        values = gathered.data();
                    }
                    const Grid found = finder.find(values, importance ? importance + group * size : nullptr, size);
                    scales[row * groups + group] = found.scale;
                    zeros[row * groups + group] = found.zero;
                    if (!(found.error < std::numeric_limits<float>::infinity())) bad = true;
                    encode(values, size, found, top, codes + row * columns + group * size);
                }
            }
        }
    }
    *failed = bad;
}
