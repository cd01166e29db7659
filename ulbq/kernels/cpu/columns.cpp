// Products with column codebooks, read where they are stored: every column has a table of its levels times its input.
//
// Codes of a column lie along the outputs, a bit plane after the other. Up to four planes make an index from 0 to 15
// for each output: those of one column, or of two columns of 2 bits, whose table then holds the 16 sums of both. The
// lookup is a permutation of one register. Nothing is rounded but in float32.

#include <omp.h>

#include "codebooks.h"
#include "linear.h"
#include "tiles.h"

namespace ulbq {

constexpr int64_t kBlock = 256;  // outputs at a time
constexpr int64_t kPlaces = 64;  // rows whose tables exist at a time, where no matrix has more
constexpr int64_t kFlush = 64;   // lookups that are added up before they join the total, to keep rounding small

// One lookup: up to four planes, the least significant bit of the index first.
struct Lookup {
    int bits;
    int64_t plane[4];
    int64_t column[2];  // sorted; the second is -1 but for pairs
    int64_t level[2];   // where the levels of each begin
};

inline int64_t lookups(const Columns& w, Lookup* to) {
    const Planes planes(w);
    int64_t count = 0, level = 0;
    for (int64_t column = 0; column < w.columns;) {
        Lookup& one = to[count++];
        one = Lookup{width(w, column), {0, 0, 0, 0}, {column, -1}, {level, 0}};
        for (int bit = 0; bit < one.bits; ++bit) one.plane[bit] = planes.row(bit, column);
        level += int64_t{1} << one.bits;
        ++column;
        if (one.bits == 2 && column < w.columns) {
            one.column[1] = column;
            one.level[1] = level;
            one.plane[2] = planes.row(0, column);
            one.plane[3] = planes.row(1, column);
            one.bits = 4;
            level += 4;
            ++column;
        }
    }
    return count;
}

inline void fill_table(const Columns& w, const Lookup& one, const void* x, int type, int64_t row, float* table) {
    const float first_input = value(x, type, row * w.columns + w.order[one.column[0]]);
    const uint16_t* levels = w.levels + one.level[0];
    if (one.column[1] < 0) {
        const __mmask16 mask = first(int64_t{1} << one.bits);
        _mm512_store_ps(table, _mm512_mul_ps(load_floats(levels, kFloat16, 0, mask), _mm512_set1_ps(first_input)));
        return;
    }
    const float second_input = value(x, type, row * w.columns + w.order[one.column[1]]);
    const __m512i low = _mm512_and_si512(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), _mm512_set1_epi32(3));
    const __m512i high = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
    const __m512 one_level = _mm512_permutexvar_ps(low, load_floats(levels, kFloat16, 0, 15));
    const __m512 other = _mm512_permutexvar_ps(high, load_floats(w.levels + one.level[1], kFloat16, 0, 15));
    const __m512 product = _mm512_mul_ps(other, _mm512_set1_ps(second_input));
    _mm512_store_ps(table, _mm512_fmadd_ps(one_level, _mm512_set1_ps(first_input), product));
}

// Lookups of 64 outputs: lane l of sum[s] is output 4l + s.
template <int Bits>
inline __attribute__((always_inline)) void look_up(const Lookup& one, const uint8_t* codes, int64_t row_bytes, int64_t bytes,
                                                   __m512 table, __m512 (&sum)[4]) {
    __m512i index = _mm512_setzero_si512();
#pragma GCC unroll 4
    for (int bit = 0; bit < Bits; ++bit) {
        uint64_t word = 0;
        std::memcpy(&word, codes + one.plane[bit] * row_bytes, bytes);
        const __m512i weight = _mm512_set1_epi8(static_cast<char>(1 << bit));
        index = bit ? _mm512_mask_add_epi8(index, word, index, weight) : _mm512_maskz_mov_epi8(word, weight);
    }
#pragma GCC unroll 4
    for (int s = 0; s < 4; ++s) {  // a permutation looks at the lowest four bits of a lane and no others
        sum[s] = _mm512_add_ps(sum[s], _mm512_permutexvar_ps(s ? _mm512_srli_epi32(index, 8 * s) : index, table));
    }
}

inline __attribute__((always_inline)) void look_up(const Lookup& one, const uint8_t* codes, int64_t row_bytes, int64_t bytes,
                                                   const float* tables, __m512 (&sum)[4]) {
    const __m512 table = _mm512_load_ps(tables);
    if (one.bits == 4) return look_up<4>(one, codes, row_bytes, bytes, table, sum);
    if (one.bits == 3) return look_up<3>(one, codes, row_bytes, bytes, table, sum);
    look_up<2>(one, codes, row_bytes, bytes, table, sum);
}

// Adds some lookups, from `from` to `to`, of `Parts` times 64 outputs from `begin` on, as their lanes are.
template <int Parts>
inline void add(const Columns& w, const Lookup* all, int64_t from, int64_t to, const float* tables, int64_t begin, __m512 (&total)[Parts][4]) {
    const int64_t row_bytes = w.outs / 8;
    const uint8_t* codes = w.codes + begin / 8;
    const bool whole = begin + 64 * Parts <= w.outs;
    __m512 sum[Parts][4] = {};
    for (int64_t index = from; index < to; ++index) {
        // Planes lie where no processor guesses the next: those of the same lookup of the next ones are fetched.
        for (int bit = 0; bit < all[index].bits; ++bit) {
            _mm_prefetch(reinterpret_cast<const char*>(codes + (all[index].plane[bit] + kFlush) * row_bytes), _MM_HINT_T0);
        }
        if (whole) {
#pragma GCC unroll 4
            for (int part = 0; part < Parts; ++part) {
                look_up(all[index], codes + 8 * part, row_bytes, 8, tables + 16 * index, sum[part]);
            }
            continue;
        }
        for (int part = 0; part < Parts; ++part) {
            const int64_t left = row_bytes - begin / 8 - 8 * part;
            if (left > 0) look_up(all[index], codes + 8 * part, row_bytes, left < 8 ? left : 8, tables + 16 * index, sum[part]);
        }
    }
    for (int part = 0; part < Parts; ++part) {
        for (int s = 0; s < 4; ++s) total[part][s] = _mm512_add_ps(total[part][s], sum[part][s]);
    }
}

// `Parts` times 64 outputs in their order.
template <int Parts>
inline void straighten(const __m512 (&total)[Parts][4], float* result) {
    for (int part = 0; part < Parts; ++part) {
        for (int s = 0; s < 4; ++s) {
            float lane[16];
            _mm512_storeu_ps(lane, total[part][s]);
            for (int l = 0; l < 16; ++l) result[64 * part + 4 * l + s] = lane[l];
        }
    }
}

// `Halves` times `Parts` times 64 outputs from `begin` on of one row. Halves take turns, so that what one has brought
// into the cache serves the other.
template <int Parts, int Halves = 1>
inline void block(const Columns& w, const Lookup* all, int64_t count, const float* tables, int64_t begin, float* result) {
    __m512 total[Halves][Parts][4] = {};
    for (int64_t from = 0; from < count; from += kFlush) {
        const int64_t to = from + kFlush < count ? from + kFlush : count;
        for (int half = 0; half < Halves && begin + 64 * Parts * half < w.outs; ++half) {
            add(w, all, from, to, tables, begin + 64 * Parts * half, total[half]);
        }
    }
    for (int half = 0; half < Halves; ++half) straighten(total[half], result + 64 * Parts * half);
}

// `size` outputs from `begin` on of one place.
inline void finish(const Columns& w, const Routes& routes, int64_t place, int64_t begin, int64_t size, const void* x, int type,
                   float* result, void* y) {
    for (int64_t out = 0; w.starts && out < size && begin + out < w.outs; ++out) {
        for (int32_t index = w.starts[begin + out]; index < w.starts[begin + out + 1]; ++index) {
            result[out] += w.deltas[index] * value(x, type, routes.input(place) * w.columns + w.outlier_columns[index]);
        }
    }
    for (int64_t out = 0; out < size; out += 16) {
        const __m512 sixteen = _mm512_load_ps(result + out);
        store_floats(y, type, routes.output(place) * w.outs + begin + out, first(w.outs - begin - out), sixteen);
    }
}

// The matrix of every job with the job's rows, some jobs at a time.
void multiply(const Columns* matrices, const Routes& routes, const void* x, int type, void* y, int threads) {
    const int64_t blocks = (matrices->outs + kBlock - 1) / kBlock, rows = routes.most(), most = rows < kPlaces ? kPlaces : rows;
    const Buffer<Lookup> all = buffer<Lookup>(matrices->columns);
    const int64_t count = lookups(*matrices, all.get());
    const Buffer<float> tables = buffer<float>((routes.places < most ? routes.places : most) * count * 16);
#pragma omp parallel num_threads(threads)
    {
        const Buffer<float> result = buffer<float>(kBlock);
        for (int64_t from = 0, to = 0; from < routes.count; from = to) {
            const int64_t begin = routes.begin(from);
            while (to < routes.count && routes.end(to) - begin <= most) ++to;
            const int64_t end = routes.end(to - 1);
#pragma omp for schedule(static) collapse(2)
            for (int64_t place = begin; place < end; ++place) {
                for (int64_t index = 0; index < count; ++index) {
                    const int64_t job = routes.owner[place];
                    if (job < 0) continue;
                    float* table = tables.get() + ((place - begin) * count + index) * 16;
                    fill_table(matrices[job], all[index], x, type, routes.input(place), table);
                }
            }
#pragma omp for schedule(dynamic, 1) collapse(3)
            for (int64_t job = from; job < to; ++job) {
                for (int64_t at = 0; at < blocks; ++at) {
                    for (int64_t row = 0; row < rows; ++row) {
                        const int64_t place = routes.begin(job) + row;
                        if (place >= routes.end(job)) continue;
                        const float* own = tables.get() + (place - begin) * count * 16;
                        block<kBlock / 64>(matrices[job], all.get(), count, own, at * kBlock, result.get());
                        finish(matrices[job], routes, place, at * kBlock, kBlock, x, type, result.get(), y);
                    }
                }
            }
        }
    }
}

// Codebooks as they are stored and one row.
struct ColumnsLinear : Linear {
    ColumnsLinear(const Columns& w, const int64_t (&counts)[4], const float* bias)
        : Linear(w.outs, w.columns, bias), counts{counts[0], counts[1], counts[2], counts[3]}, w(w) {
        this->w.counts = this->counts;
        places.resize(w.columns);
        places.resize(lookups(this->w, places.data()));
        places.shrink_to_fit();
    }

    int64_t scratch() const override { return 16 * static_cast<int64_t>(places.size()); }

    void multiply(const float* x, float* y, Own&, float* tables) const override {
        const int64_t count = static_cast<int64_t>(places.size());
#pragma omp for schedule(static)
        for (int64_t index = 0; index < count; ++index) fill_table(w, places[index], x, kFloat32, 0, tables + 16 * index);
        // Few outputs in small pieces, so that each thread gets some.
        outs < 8 * kBlock ? blocks<1, 1>(x, tables, y) : blocks<kBlock / 64, 2>(x, tables, y);
    }

  private:
    template <int Parts, int Halves>
    void blocks(const float* x, const float* tables, float* y) const {
        constexpr int64_t kSize = 64 * Parts * Halves;
#pragma omp for schedule(dynamic, 1) nowait
        for (int64_t begin = 0; begin < outs; begin += kSize) {
            alignas(64) float result[kSize];
            block<Parts, Halves>(w, places.data(), static_cast<int64_t>(places.size()), tables, begin, result);
            finish(w, lone, 0, begin, kSize, x, kFloat32, result, y);
            for (int64_t at = begin; bias && at < begin + kSize && at < outs; at += 16) put(y, at, load(y + at, first(outs - at)));
        }
    }

    const int64_t counts[4];
    Columns w;
    std::vector<Lookup> places;
    const Routes lone{1};
};

#ifdef __AVX512VBMI__

// Columns of one width, in tiles (tiles.h), and the first of them in sorted order.
struct Section {
    const uint8_t* codes;
    int64_t width, begin, count, level;  // where the levels of the first begin

    int64_t chunks() const { return (count + kChunk - 1) / kChunk; }
    int64_t chunk_bytes() const { return 512 * width; }
    int64_t tables() const { return width == 2 ? 8 : 16; }  // of a chunk: of two columns of each byte, or of one
};

// Codebooks in tiles and one row, its products with levels rounded to 16 bits of the largest of 64 columns.
struct TiledColumnsLinear : Linear {
    TiledColumnsLinear(const Columns& w, const uint8_t* const (&codes)[3], const float* bias) : Linear(w.outs, w.columns, bias), w(w) {
        int64_t begin = 0, level = 0;
        for (int which = 0; which < 3; ++which) {
            const int64_t width = 4 - which, next = which < 2 ? w.counts[3 - which] : w.columns;
            sections.push_back({codes[which], width, begin, next - begin, level});
            level += (next - begin) << width;
            begin = next;
        }
        this->w.counts = nullptr;  // the caller's
    }

    int64_t scratch() const override {
        int64_t count = 0;
        for (const Section& of : sections) count += of.chunks() * size(of);
        return count;
    }

    void multiply(const float* x, float* y, Own&, float* tables) const override {
        float* to = tables;
        for (const Section& of : sections) {
#pragma omp for schedule(static) nowait
            for (int64_t chunk = 0; chunk < of.chunks(); ++chunk) fill(of, chunk, x, to + chunk * size(of));
            to += of.chunks() * size(of);
        }
#pragma omp barrier
        // NaN where one of the inputs is not finite.
        __m512 strange = _mm512_setzero_ps();
        for (int64_t at = 0; at < columns; at += 16) {
            const __m512 some = load(x + at, first(columns - at));
            strange = _mm512_add_ps(strange, _mm512_sub_ps(some, some));
        }
        const __m512 start = all(_mm512_reduce_add_ps(strange));
        share((outs + kTile - 1) / kTile, [&](int64_t tile) {
            __m512 sum[kVectors] = {start, start, start, start};
            const float* from = tables;
            for (const Section& of : sections) {
                if (of.width == 4) add<4>(of, tile, from, sum);
                if (of.width == 3) add<3>(of, tile, from, sum);
                if (of.width == 2) add<2>(of, tile, from, sum);
                from += of.chunks() * size(of);
            }
            alignas(64) float result[kTile];
            for (int v = 0; v < kVectors; ++v) _mm512_store_ps(result + 16 * v, sum[v]);
            add_outliers(tile * kTile, x, result);
            for (int64_t at = 0; at < kTile; at += 16) put(y, tile * kTile + at, _mm512_load_ps(result + at));
        });
    }

  private:
    // Floats of a chunk: its tables, and its factor on a line of its own.
    static int64_t size(const Section& of) { return of.tables() * kTable / 4 + 16; }

    // A chunk's tables: the products of levels and inputs, or sums of two, as integers, and by what these are multiplied.
    void fill(const Section& of, int64_t chunk, const float* x, float* to) const {
        alignas(64) float products[16][4][16];  // of each table: of each byte of a lane
        __m512 largest = _mm512_setzero_ps();
        for (int64_t table = 0; table < of.tables(); ++table) {
            for (int64_t byte = 0; byte < 4; ++byte) {
                const int64_t column = chunk * kChunk + (of.width == 2 ? 8 : 4) * table + byte;
                __m512 product = times_levels(of, column, x, 0);
                if (of.width == 2) product = _mm512_add_ps(product, times_levels(of, column + 4, x, 2));
                largest = _mm512_max_ps(largest, _mm512_abs_ps(product));
                _mm512_store_ps(products[table][byte], product);
            }
        }
        const float most = _mm512_reduce_max_ps(largest);
        const bool silent = !(most >= 1e-30f);
        to[of.tables() * kTable / 4] = silent ? 0.0f : most / 32600.0f;
        const __m512 inverse = all(silent ? 0.0f : 32600.0f / most);
        uint8_t* bytes = reinterpret_cast<uint8_t*>(to);
        for (int64_t table = 0; table < of.tables(); ++table, bytes += kTable) {
            __m256i whole[4];
            for (int byte = 0; byte < 4; ++byte) {
                whole[byte] = _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(_mm512_mul_ps(_mm512_load_ps(products[table][byte]), inverse)));
            }
            store_table(_mm512_inserti64x4(_mm512_castsi256_si512(whole[0]), whole[1], 1),
                        _mm512_inserti64x4(_mm512_castsi256_si512(whole[2]), whole[3], 1), bytes);
        }
    }

    // An input times what two bits of sixteen codes from `bit` on name, or the codes; zeros behind the last column.
    __m512 times_levels(const Section& of, int64_t column, const float* x, int bit) const {
        if (column >= of.count) return _mm512_setzero_ps();
        const __m512 input = all(x[w.order[of.begin + column]]);
        const __m512 levels = load_floats(w.levels, kFloat16, of.level + (column << of.width), first(int64_t{1} << of.width));
        if (of.width != 2) return _mm512_mul_ps(levels, input);
        // Lane l has level l mod 4, or l / 4.
        const __m512i index = bit ? _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3)
                                  : _mm512_setr_epi32(0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3);
        return _mm512_mul_ps(_mm512_permutexvar_ps(index, levels), input);
    }

    template <int Width>
    void add(const Section& of, int64_t tile, const float* tables, __m512 (&total)[kVectors]) const {
        const uint8_t* chunk = of.codes + tile * of.chunks() * of.chunk_bytes();
        for (int64_t index = 0; index < of.chunks(); ++index, chunk += of.chunk_bytes(), tables += size(of)) {
            for (int64_t line = 0; line < of.chunk_bytes(); line += 64) _mm_prefetch(chunk + 8192 + line, _MM_HINT_T1);
            const uint8_t* table = reinterpret_cast<const uint8_t*>(tables);
            Looked found[kVectors];
            if (Width == 3) {
#pragma GCC unroll 16
                for (int step = 0; step < kSteps; ++step) {
#pragma GCC unroll 4
                    for (int v = 0; v < kVectors; ++v) found[v].look(unfold<3>(chunk, v, step), table + step * kTable);
                }
            } else {
#pragma GCC unroll 1
                for (int pair = 0; pair < 2 * Width; ++pair) {  // not unrolled: compilers would load all tables at first
#pragma GCC unroll 4
                    for (int v = 0; v < kVectors; ++v) found[v].add(load_bytes(chunk + (pair * kVectors + v) * 64), table + 2 * pair * kTable);
                }
            }
            const __m512 factor = all(tables[of.tables() * kTable / 4]);
            for (int v = 0; v < kVectors; ++v) total[v] = _mm512_fmadd_ps(found[v].sum(), factor, total[v]);
        }
    }

    void add_outliers(int64_t begin, const float* x, float* result) const {
        for (int64_t out = 0; w.starts && out < kTile && begin + out < outs; ++out) {
            for (int32_t index = w.starts[begin + out]; index < w.starts[begin + out + 1]; ++index) {
                result[out] += w.deltas[index] * x[w.outlier_columns[index]];
            }
        }
    }

    Columns w;
    std::vector<Section> sections;
};

#endif

}  // namespace ulbq

using namespace ulbq;

// A matrix for ulbq_decode.
extern "C" void ulbq_columns_linear(const uint8_t* codes, int64_t outs, int64_t columns, const int64_t* counts,
                                    const uint16_t* levels, const int32_t* order, const int32_t* starts,
                                    const int32_t* outlier_columns, const float* deltas, const float* bias,
                                    const Linear** made) {
    const int64_t own[4] = {counts[0], counts[1], counts[2], counts[3]};
    *made = new ColumnsLinear({codes, outs, columns, counts, levels, order, starts, outlier_columns, deltas}, own, bias);
}

// The same of codes in tiles: of the columns of 4 bits, of 3 and of 2, in sorted order. Nothing is made where the processor
// does not look bytes up.
extern "C" void ulbq_tiled_columns_linear(const uint8_t* of_four, const uint8_t* of_three, const uint8_t* of_two, int64_t outs,
                                          int64_t columns, const int64_t* counts, const uint16_t* levels, const int32_t* order,
                                          const int32_t* starts, const int32_t* outlier_columns, const float* deltas,
                                          const float* bias, const Linear** made) {
#ifdef __AVX512VBMI__
    *made = new TiledColumnsLinear({nullptr, outs, columns, counts, levels, order, starts, outlier_columns, deltas},
                                   {of_four, of_three, of_two}, bias);
#endif
}

// y [rows][outs] = x [rows][columns] times the matrix, in the type of x. Eight divides outs.
extern "C" void ulbq_columns(const uint8_t* codes, int64_t outs, int64_t columns, const int64_t* counts,
                             const uint16_t* levels, const int32_t* order, const int32_t* starts,
                             const int32_t* outlier_columns, const float* deltas, const void* x, int type, int64_t rows,
                             void* y, int threads) {
    const Columns w{codes, outs, columns, counts, levels, order, starts, outlier_columns, deltas};
    ulbq::multiply(&w, Routes(rows), x, type, y, threads);
}

// y [places][outs]: of matrices of one shape, at the addresses of a table, each with the rows of its jobs (routes.h).
extern "C" void ulbq_columns_each(const int64_t* table, int64_t outs, int64_t columns, const int64_t* counts,
                                  const int64_t* jobs, int64_t count, const int64_t* order, int64_t places, int64_t share,
                                  const void* x, int type, void* y, int threads) {
    const std::vector<Columns> matrices = of_jobs(table, outs, columns, counts, jobs, count);
    ulbq::multiply(matrices.data(), Routes(jobs, count, order, places, share), x, type, y, threads);
}
