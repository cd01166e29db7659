// Products of several bfloat16 rows with column codebooks.
//
// Columns go in the order in which they are stored, two of them a pair, their levels rounded to bfloat16. Outputs of a
// vector come as interleaving two columns leaves them, and are put straight behind the last chunk. What outliers add is
// taken in float32.

#include <omp.h>

#include "codebooks.h"
#include "dots.h"

#ifdef __AVX512BF16__

namespace ulbq {

// Levels of all columns as bfloat16: [columns][16].
inline Buffer<uint16_t> rounded_levels(const Columns& w) {
    Buffer<uint16_t> table = buffer<uint16_t>(w.columns * 16);
    for (int64_t column = 0, level = 0; column < w.columns; ++column) {
        const int64_t count = int64_t{1} << width(w, column);
        const __m512 levels = load_floats(w.levels + level, kFloat16, 0, first(count));
        _mm256_store_si256(reinterpret_cast<__m256i*>(table.get() + column * 16), (__m256i)_mm512_cvtneps_pbh(levels));
        level += count;
    }
    return table;
}

// Weights of one column, 16 bits each: outputs begin to begin + 32 and the next 32. `words` has a bit plane's 64 bits.
template <int Bits>
inline __attribute__((always_inline)) void weights(const uint64_t (&words)[4], const uint16_t* levels, __m512i (&to)[2]) {
    const __m512i table = _mm512_castsi256_si512(_mm256_load_si256(reinterpret_cast<const __m256i*>(levels)));
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
        __m512i index = _mm512_maskz_set1_epi16(static_cast<__mmask32>(words[0] >> 32 * half), 1);
#pragma GCC unroll 4
        for (int bit = 1; bit < Bits; ++bit) {
            const __mmask32 set = static_cast<__mmask32>(words[bit] >> 32 * half);
            index = _mm512_mask_add_epi16(index, set, index, _mm512_set1_epi16(1 << bit));
        }
        to[half] = _mm512_permutexvar_epi16(index, table);
    }
}

struct Widener {
    const Columns& w;
    const Planes planes;
    const Buffer<uint16_t>& levels;

    Widener(const Columns& w, const Buffer<uint16_t>& levels) : w(w), planes(w), levels(levels) {}

    // Weights of a column for up to 64 outputs from `begin` on; zeros behind the last column.
    void column(int64_t column, int64_t begin, __m512i (&to)[2]) const {
        if (column >= w.columns) {
            to[0] = to[1] = _mm512_setzero_si512();
            return;
        }
        const int64_t row_bytes = w.outs / 8, left = row_bytes - begin / 8, bits = width(w, column);
        uint64_t words[4] = {0, 0, 0, 0};
        for (int bit = 0; bit < bits; ++bit) {
            const uint8_t* from = w.codes + planes.row(bit, column) * row_bytes + begin / 8;
            if (left >= 8) {
                std::memcpy(&words[bit], from, 8);
            } else {
                std::memcpy(&words[bit], from, left);
            }
        }
        const uint16_t* own = levels.get() + column * 16;
        if (bits == 2) return weights<2>(words, own, to);
        if (bits == 3) return weights<3>(words, own, to);
        weights<4>(words, own, to);
    }

    void chunk(int64_t chunk, int64_t begin, uint32_t* wide) const {
        for (int pair = 0; pair < kPairs; ++pair) {
            __m512i one[2], other[2];
            column(chunk * kChunk + 2 * pair, begin, one);
            column(chunk * kChunk + 2 * pair + 1, begin, other);
            for (int half = 0; half < 2; ++half) {
                uint32_t* to = wide + pair * kTile + 32 * half;
                _mm512_store_si512(to, _mm512_unpacklo_epi16(one[half], other[half]));
                _mm512_store_si512(to + 16, _mm512_unpackhi_epi16(one[half], other[half]));
            }
        }
    }
};

// 32 outputs in their order again.
inline void straighten(float* result) {
    const __m512i front = _mm512_set_epi32(23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0);
    const __m512i back = _mm512_add_epi32(front, _mm512_set1_epi32(8));
    const __m512 low = _mm512_load_ps(result), high = _mm512_load_ps(result + 16);
    _mm512_store_ps(result, _mm512_permutex2var_ps(low, front, high));
    _mm512_store_ps(result + 16, _mm512_permutex2var_ps(low, back, high));
}

// Activations as float32, [columns][places] with places filled up to whole vectors: what outliers are multiplied with.
struct Upright {
    Upright(const uint16_t* x, const Routes& routes, int64_t columns)
        : stride((routes.places + 31) / 16 * 16), values(buffer<float>(columns * stride)) {
        std::memset(values.get(), 0, columns * stride * sizeof(float));
        for (int64_t place = 0; columns && place < routes.places; ++place) {
            const int64_t from = routes.input(place) * columns;
            for (int64_t column = 0; column < columns; ++column) values[column * stride + place] = value(x, kBFloat16, from + column);
        }
    }

    const int64_t stride;
    const Buffer<float> values;
};

// Adds the outliers of 64 outputs to rows `begin` to `end`, where result [end - begin][64] begins.
inline void add_outliers(const Columns& w, const Upright& x, int64_t out, int64_t begin, int64_t end, float* result) {
    for (int64_t lane = 0; lane < kTile && out + lane < w.outs; ++lane) {
        const int32_t from = w.starts[out + lane], to = w.starts[out + lane + 1];
        for (int64_t row = begin; from < to && row < end; row += 16) {
            __m512 sum = _mm512_setzero_ps();
            for (int32_t index = from; index < to; ++index) {
                const float* column = x.values.get() + w.outlier_columns[index] * x.stride;
                sum = _mm512_fmadd_ps(_mm512_set1_ps(w.deltas[index]), _mm512_loadu_ps(column + row), sum);
            }
            float rows[16];
            _mm512_storeu_ps(rows, sum);
            for (int64_t r = 0; r < 16 && row + r < end; ++r) result[(row - begin + r) * kTile + lane] += rows[r];
        }
    }
}

// The matrix of every job with the job's rows.
void dots(const Columns* matrices, const Routes& routes, const uint16_t* x, uint16_t* y, int threads) {
    const int64_t outs = matrices->outs, columns = matrices->columns;
    const Upright upright(x, routes, matrices->starts ? columns : 0);
    Rows ordered(routes.places, columns, kChunk);
    std::vector<Buffer<uint16_t>> levels(routes.count);
    const int64_t blocks = (routes.most() + kRows - 1) / kRows, tiles = (outs + kTile - 1) / kTile;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static) nowait
        for (int64_t job = 0; job < routes.count; ++job) levels[job] = rounded_levels(matrices[job]);
#pragma omp for schedule(static)
        for (int64_t place = 0; place < routes.places; ++place) {
            const int64_t job = routes.owner[place];
            if (job >= 0) ordered.take_in_order(x, routes.input(place), place, matrices[job].order);
        }
        const Buffer<float> result = buffer<float>(kRows * kTile);
        const Buffer<uint32_t> wide = buffer<uint32_t>(kPairs * kTile);
#pragma omp for schedule(dynamic, 1) collapse(3) nowait
        for (int64_t job = 0; job < routes.count; ++job) {
            for (int64_t block = 0; block < blocks; ++block) {
                for (int64_t tile = 0; tile < tiles; ++tile) {
                    const int64_t begin = routes.begin(job) + block * kRows, last = routes.end(job);
                    const int64_t end = begin + kRows < last ? begin + kRows : last;
                    if (begin >= end) continue;
                    const Columns& w = matrices[job];
                    const Widener widener(w, levels[job]);
                    std::memset(result.get(), 0, (end - begin) * kTile * sizeof(float));
                    for (int64_t chunk = 0; chunk < ordered.chunks; ++chunk) {
                        widener.chunk(chunk, tile * kTile, wide.get());
                        add_chunk(wide.get(), 0, kPairs, ordered, chunk, 0, begin, end, Rounded{}, result.get());
                    }
                    for (int64_t at = 0; at < (end - begin) * kTile; at += 32) straighten(result.get() + at);
                    if (w.starts) add_outliers(w, upright, tile * kTile, begin, end, result.get());
                    store_tile(result.get(), routes, begin, end, tile, outs, y);
                }
            }
        }
    }
}

}  // namespace ulbq

using namespace ulbq;

// y [rows][outs] = x [rows][columns] times the matrix, both bfloat16. Eight divides outs.
extern "C" void ulbq_column_dots(const uint8_t* codes, int64_t outs, int64_t columns, const int64_t* counts,
                                 const uint16_t* levels, const int32_t* order, const int32_t* starts,
                                 const int32_t* outlier_columns, const float* deltas, const uint16_t* x, int64_t rows,
                                 uint16_t* y, int threads) {
    const Columns w{codes, outs, columns, counts, levels, order, starts, outlier_columns, deltas};
    ulbq::dots(&w, Routes(rows), x, y, threads);
}

// y [places][outs]: of matrices of one shape, at the addresses of a table, each with the rows of its jobs (routes.h).
extern "C" void ulbq_column_dots_each(const int64_t* table, int64_t outs, int64_t columns, const int64_t* counts,
                                      const int64_t* jobs, int64_t count, const int64_t* order, int64_t places,
                                      int64_t share, const uint16_t* x, uint16_t* y, int threads) {
    const std::vector<Columns> matrices = of_jobs(table, outs, columns, counts, jobs, count);
    ulbq::dots(matrices.data(), Routes(jobs, count, order, places, share), x, y, threads);
}

#endif
