// Products with tiles of integer codes.

#include <omp.h>

#include <cmath>

#include "linear.h"
#include "tiles.h"

namespace ulbq {

// The integer dot products of one tile and `Rows` rows over `Count` columns of a chunk, as floats: in units of factors.
template <int Bits, int Digits, int Rows, int Count>
inline __attribute__((always_inline)) void accumulate(const uint8_t* chunk, const int8_t* const (&digit)[Rows][Digits],
                                                      int first_step, __m512 (&product)[Rows][kVectors]) {
    __m512i sum[Rows][Digits][kVectors];
#pragma GCC unroll 16
    for (int index = 0; index < Count / 4; ++index) {
        const int step = first_step + index;
        __m512i code[kVectors];
#pragma GCC unroll 4
        for (int vector = 0; vector < kVectors; ++vector) code[vector] = unfold<Bits>(chunk, vector, step);
#pragma GCC unroll 4
        for (int row = 0; row < Rows; ++row) {
#pragma GCC unroll 4
            for (int which = 0; which < Digits; ++which) {
                int32_t four;
                std::memcpy(&four, digit[row][which] + 4 * step, 4);
                const __m512i columns = _mm512_set1_epi32(four);
#pragma GCC unroll 4
                for (int vector = 0; vector < kVectors; ++vector) {
                    const __m512i before = index ? sum[row][which][vector] : _mm512_setzero_si512();
                    sum[row][which][vector] = _mm512_dpbusd_epi32(before, code[vector], columns);
                }
            }
        }
    }
#pragma GCC unroll 4
    for (int row = 0; row < Rows; ++row) {
#pragma GCC unroll 4
        for (int vector = 0; vector < kVectors; ++vector) {
            const __m512i high = _mm512_slli_epi32(sum[row][Digits - 2][vector], 8);
            product[row][vector] = _mm512_cvtepi32_ps(_mm512_add_epi32(high, sum[row][Digits - 1][vector]));
            if (Digits == 3) {
                const __m512 highest = _mm512_cvtepi32_ps(sum[row][0][vector]);
                product[row][vector] = _mm512_fmadd_ps(highest, _mm512_set1_ps(65536.0f), product[row][vector]);
            }
        }
    }
}

// Adds a unit's sums for rows, scaled, to `result` [Rows][64].
template <int Rows, class Input>
inline __attribute__((always_inline)) void add_scaled(const Tiles& w, const Input& x, int64_t tile, int part, int64_t unit,
                                                      int64_t row, const __m512 (&product)[Rows][kVectors], float* result) {
    const int64_t group = w.group_of[unit];
#pragma GCC unroll 4
    for (int vector = 0; vector < kVectors; ++vector) {
        const __m512 scale = w.load_scale(tile, part, group, vector), zero = w.load_zero(tile, group, vector);
#pragma GCC unroll 4
        for (int r = 0; r < Rows; ++r) {
            const __m512 factor = _mm512_set1_ps(x.factors[(row + r) * x.units + unit]);
            const __m512 total = _mm512_set1_ps(x.sums[(row + r) * x.units + unit]);
            float* to = result + r * kTile + 16 * vector;
            const __m512 centred = _mm512_fnmadd_ps(zero, total, _mm512_mul_ps(product[r][vector], factor));
            _mm512_store_ps(to, _mm512_fmadd_ps(scale, centred, _mm512_load_ps(to)));
        }
    }
}

// Adds what one unit of columns contributes to `result` [Rows][64].
template <int Bits, int Rows, int Count, int Digits>
inline __attribute__((always_inline)) void add_unit(const Tiles& w, const Activations<Digits>& x, int64_t tile, int part,
                                                    int64_t chunk, int first_step, int64_t row, float* result) {
    const int64_t unit = chunk * kChunk / w.unit() + first_step * 4 / Count;
    const int8_t* digit[Rows][Digits];
    for (int r = 0; r < Rows; ++r) {
        for (int which = 0; which < Digits; ++which) digit[r][which] = x.digit(row + r, which) + chunk * kChunk;
    }
    __m512 product[Rows][kVectors];
    accumulate<Bits, Digits, Rows, Count>(w.chunk(tile, chunk, part), digit, first_step, product);
    add_scaled(w, x, tile, part, unit, row, product, result);
}

template <int Bits, int Rows, int Digits>
inline void add_chunk(const Tiles& w, const Activations<Digits>& x, int64_t tile, int64_t chunk, int64_t row, float* result) {
    for (int part = 0; part < w.parts; ++part) {
        if (w.unit() == kChunk) {
            add_unit<Bits, Rows, 64>(w, x, tile, part, chunk, 0, row, result);
        } else {
            add_unit<Bits, Rows, 32>(w, x, tile, part, chunk, 0, row, result);
            add_unit<Bits, Rows, 32>(w, x, tile, part, chunk, 8, row, result);
        }
    }
}

template <_mm_hint Where, int64_t Ahead>
inline void fetch_ahead(const Tiles& w, int64_t tile, int64_t chunk) {
    const uint8_t* ahead = w.chunk(tile, chunk, 0) + Ahead;
    for (int64_t line = 0; line < w.parts * w.chunk_bytes(); line += 64) _mm_prefetch(ahead + line, Where);
}

// One tile of a matrix and the rows from `begin` to `end`, to `result` [end - begin][64].
template <int Bits, int Digits>
void multiply_tile(const Tiles& w, const Activations<Digits>& x, int64_t tile, int64_t begin, int64_t end, float* result) {
    std::memset(result, 0, (end - begin) * kTile * sizeof(float));
    for (int64_t chunk = 0; chunk < w.chunks(); ++chunk) {
        fetch_ahead<_MM_HINT_T0, 4096>(w, tile, chunk);
        int64_t row = begin;
        float* to = result;
        if (Digits == 2) {
            for (; row + 3 <= end; row += 3, to += 3 * kTile) add_chunk<Bits, 3>(w, x, tile, chunk, row, to);
        }
        for (; row + 2 <= end; row += 2, to += 2 * kTile) add_chunk<Bits, 2>(w, x, tile, chunk, row, to);
        if (row < end) add_chunk<Bits, 1>(w, x, tile, chunk, row, to);
    }
}

// The matrix of every job with the job's rows.
template <int Bits, int Digits>
void multiply(const Tiles* matrices, const Routes& routes, const void* x, int type, void* y, int threads) {
    const int64_t outs = matrices->outs, tiles = matrices->tiles();
    Activations<Digits> rounded(routes.places, matrices->columns, matrices->unit());
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t place = 0; place < routes.places; ++place) {
            if (routes.owner[place] >= 0) rounded.round_row(x, type, routes.input(place), place);
        }
        const Buffer<float> result = buffer<float>(routes.most() * kTile);
#pragma omp for schedule(dynamic, 1) collapse(2) nowait
        for (int64_t job = 0; job < routes.count; ++job) {
            for (int64_t tile = 0; tile < tiles; ++tile) {
                const int64_t begin = routes.begin(job), end = routes.end(job);
                multiply_tile<Bits>(matrices[job], rounded, tile, begin, end, result.get());
                for (int64_t place = begin; place < end; ++place) {
                    for (int64_t out = 0; out < kTile; out += 16) {
                        const int64_t at = tile * kTile + out;
                        const __m512 value = _mm512_load_ps(result.get() + (place - begin) * kTile + out);
                        store_floats(y, type, routes.output(place) * outs + at, first(outs - at), value);
                    }
                }
            }
        }
    }
}

template <int Bits>
void multiply(const Tiles* matrices, const Routes& routes, const void* x, int type, void* y, int threads) {
    if (type == kFloat32) {
        multiply<Bits, 3>(matrices, routes, x, type, y, threads);
    } else {
        multiply<Bits, 2>(matrices, routes, x, type, y, threads);
    }
}

void multiply(const Tiles* matrices, const Routes& routes, const void* x, int type, void* y, int threads) {
    switch (matrices->bits) {
        case 1: return multiply<1>(matrices, routes, x, type, y, threads);
        case 2: return multiply<2>(matrices, routes, x, type, y, threads);
        case 3: return multiply<3>(matrices, routes, x, type, y, threads);
        case 4: return multiply<4>(matrices, routes, x, type, y, threads);
    }
}

// Weights of outputs from `begin` on, transposed: dense [columns][count], count a multiple of 64 but for the last ones.
template <int Bits, int Type>
void widen(const Tiles& w, int64_t begin, int64_t count, void* dense, int threads) {
    const int64_t chunks = w.chunks(), tiles = (count + kTile - 1) / kTile, width = w.unit() / 4;
#pragma omp parallel for num_threads(threads) schedule(static) collapse(2)
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        for (int64_t index = 0; index < tiles * kVectors; ++index) {
            const int64_t tile = begin / kTile + index / kVectors;
            const int vector = static_cast<int>(index % kVectors);
            const __mmask16 mask = first(count - 16 * index);
            __m512 scale[2] = {}, zero = {};
            for (int step = 0; step < kSteps; ++step) {
                if (step % width == 0) {
                    const int64_t group = w.group_of[(chunk * kSteps + step) / width];
                    for (int part = 0; part < w.parts; ++part) scale[part] = w.load_scale(tile, part, group, vector);
                    zero = w.load_zero(tile, group, vector);
                }
                __m512i code[2] = {};
                for (int part = 0; part < w.parts; ++part) code[part] = unfold<Bits>(w.chunk(tile, chunk, part), vector, step);
                const int64_t column = chunk * kChunk + 4 * step;
                for (int byte = 0; byte < 4 && column + byte < w.columns; ++byte) {
                    __m512 value[2];
                    for (int part = 0; part < w.parts; ++part) {
                        const __m512i one = _mm512_and_si512(_mm512_srli_epi32(code[part], 8 * byte), _mm512_set1_epi32(255));
                        value[part] = _mm512_mul_ps(_mm512_sub_ps(_mm512_cvtepi32_ps(one), zero), scale[part]);
                    }
                    const __m512 weight = w.parts == 2 ? _mm512_add_ps(value[0], value[1]) : value[0];
                    store_floats(dense, Type, (column + byte) * count + 16 * index, mask, weight);
                }
            }
        }
    }
}

template <int Bits>
void widen(const Tiles& w, int64_t begin, int64_t count, void* dense, int type, int threads) {
    switch (type) {
        case kFloat32: return widen<Bits, kFloat32>(w, begin, count, dense, threads);
        case kBFloat16: return widen<Bits, kBFloat16>(w, begin, count, dense, threads);
        case kFloat16: return widen<Bits, kFloat16>(w, begin, count, dense, threads);
    }
}

// A tile and one row, to `result` [64].
template <int Bits, int Digits>
void add_tile(const Tiles& w, const Activations<Digits>& x, int64_t tile, float* result) {
    multiply_tile<Bits>(w, x, tile, 0, 1, result);
}

#ifdef __AVX512VBMI__

// A part of a tile, and the 64 results that it adds to.
struct Part {
    int64_t tile;
    int part;
    float* to;
};

template <int Count, int Sets>
inline void add_looked(const Tiles& w, const Tables& x, const Part (&parts)[Sets], int64_t chunk, int first_step) {
    Chunks<Sets> chunks;
    for (int set = 0; set < Sets; ++set) chunks[set] = w.chunk(parts[set].tile, chunk, parts[set].part);
    __m512 product[Sets][1][kVectors];
    look_up<Count>(chunks, x.of_chunk(chunk), first_step, product);
    const int64_t unit = chunk * kChunk / w.unit() + first_step * 4 / Count;
    for (int set = 0; set < Sets; ++set) add_scaled(w, x, parts[set].tile, parts[set].part, unit, 0, product[set], parts[set].to);
}

template <int Sets>
void add_parts(const Tiles& w, const Tables& x, const Part (&parts)[Sets]) {
    for (int64_t chunk = 0; chunk < w.chunks(); ++chunk) {
        fetch_ahead<_MM_HINT_T1, 8192>(w, parts[0].tile, chunk);
        if (w.unit() == kChunk) {
            add_looked<64>(w, x, parts, chunk, 0);
        } else {
            add_looked<32>(w, x, parts, chunk, 0);
            add_looked<32>(w, x, parts, chunk, 8);
        }
    }
}

// A tile and one row, to `result` [64].
template <int Bits>
void add_tile(const Tiles& w, const Tables& x, int64_t tile, float* result) {
    if (w.parts == 1) return add_parts<1>(w, x, {{tile, 0, result}});
    add_parts<2>(w, x, {{tile, 0, result}, {tile, 1, result}});
}

#endif

// What a row is made to be multiplied with tiles: of one bit tables, which are faster, where the processor looks bytes up.
template <int Bits, bool Exact>
struct InputOf {
#ifdef __AVX512VBMI__
    using type = std::conditional_t<Bits == 1 && !Exact, Tables, Activations<Exact ? 3 : 2>>;
#else
    using type = Activations<Exact ? 3 : 2>;
#endif
};

// Tiles and one row.
template <int Bits, bool Exact>
struct TilesLinear : Linear {
    using Input = typename InputOf<Bits, Exact>::type;

    TilesLinear(const Tiles& w, const float* bias) : Linear(w.outs, w.columns, bias), w(w) {}

    void multiply(const float* x, float* y, Own& own, float*) const override {
        each_tile(own.rounded<Input>(x, columns, w.unit()), [&](int64_t at, __m512 value) { put(y, at, value); });
    }

  protected:
    template <class Put>
    void each_tile(const Input& rounded, const Put& put_sixteen) const {
        share(w.tiles(), [&](int64_t tile) {
            alignas(64) float result[kTile] = {};
            add_tile<Bits>(w, rounded, tile, result);
            for (int64_t out = 0; out < kTile; out += 16) put_sixteen(tile * kTile + out, _mm512_load_ps(result + out));
        });
    }

    const Tiles w;
};

// What a mixture of scales has beside its signs, all float16; router and zeros may be null.
struct Mixture {
    const uint16_t *in_scales, *out_scales, *router, *zeros;
    int64_t experts;
    bool zeros_of_inputs;

    // A row of vectors [experts][width], each with its share.
    __m512 mix(const uint16_t* vectors, int64_t width, const float* shares, int64_t at) const {
        const __mmask16 mask = first(width - at);
        __m512 sum = _mm512_setzero_ps();
        for (int64_t expert = 0; expert < experts; ++expert) {
            sum = _mm512_fmadd_ps(all(shares[expert]), load_floats(vectors, kFloat16, expert * width + at, mask), sum);
        }
        return sum;
    }

    // The softmax of what the router makes of x.
    std::vector<float> shares(const float* x, int64_t columns) const {
        std::vector<float> found(experts, 1.0f);
        if (!router) return found;
        float most = -INFINITY, total = 0.0f;
        for (int64_t expert = 0; expert < experts; ++expert) {
            __m512 sum = _mm512_setzero_ps();
            for (int64_t at = 0; at < columns; at += 16) {
                const __mmask16 mask = first(columns - at);
                sum = _mm512_fmadd_ps(load_floats(router, kFloat16, expert * columns + at, mask), load(x + at, mask), sum);
            }
            found[expert] = _mm512_reduce_add_ps(sum);
            most = found[expert] > most ? found[expert] : most;
        }
        for (float& share : found) total += share = std::exp(share - most);
        for (float& share : found) share /= total;
        return found;
    }
};

// Signs in tiles between mixed scales, and one row.
template <bool Exact>
struct SignsLinear : TilesLinear<1, Exact> {
    SignsLinear(const Tiles& w, const float* bias, const Mixture& mixture) : TilesLinear<1, Exact>(w, bias), mixture(mixture) {}

    void multiply(const float* x, float* y, Own&, float*) const override {
        const int64_t columns = this->columns, outs = this->outs;
        const std::vector<float> shares = mixture.shares(x, columns);
        const Buffer<float> scaled = buffer<float>(columns);
        __m512 sum = _mm512_setzero_ps();
        for (int64_t at = 0; at < columns; at += 16) {
            const __mmask16 mask = first(columns - at);
            const __m512 value = _mm512_mul_ps(load(x + at, mask), mixture.mix(mixture.in_scales, columns, shares.data(), at));
            _mm512_mask_storeu_ps(scaled.get() + at, mask, value);
            const __m512 zero = mixture.zeros_of_inputs ? load_floats(mixture.zeros, kFloat16, at, mask) : all(1.0f);
            sum = _mm512_fmadd_ps(value, zero, sum);
        }
        const __m512 total = all(mixture.zeros ? _mm512_reduce_add_ps(sum) : 0.0f);
        typename TilesLinear<1, Exact>::Input rounded(1, columns, this->w.unit());
        rounded.round_row(scaled.get(), kFloat32, 0, 0);
        this->each_tile(rounded, [&](int64_t at, __m512 value) {
            const bool by_output = mixture.zeros && !mixture.zeros_of_inputs;
            const __m512 zero = by_output ? load_floats(mixture.zeros, kFloat16, at, first(outs - at)) : all(1.0f);
            const __m512 outer = mixture.mix(mixture.out_scales, outs, shares.data(), at);
            this->put(y, at, _mm512_mul_ps(_mm512_fmadd_ps(total, zero, value), outer));
        });
    }

    const Mixture mixture;
};

template <int Bits>
const Linear* linear(const Tiles& w, const float* bias, bool exact) {
    if (exact) return new TilesLinear<Bits, true>(w, bias);
    return new TilesLinear<Bits, false>(w, bias);
}

}  // namespace ulbq

using ulbq::Tiles;

// A matrix for ulbq_decode; `exact` inputs are rounded to 24 bits of their largest, others to 16.
extern "C" void ulbq_tiles_linear(const uint8_t* codes, int bits, int parts, int64_t outs, int64_t columns,
                                  const uint16_t* scales, const uint8_t* zeros, float centre, int64_t group,
                                  const float* bias, int exact, const ulbq::Linear** made) {
    const Tiles w(codes, bits, parts, outs, columns, scales, zeros, centre, group);
    switch (bits) {
        case 1: *made = ulbq::linear<1>(w, bias, exact); return;
        case 2: *made = ulbq::linear<2>(w, bias, exact); return;
        case 3: *made = ulbq::linear<3>(w, bias, exact); return;
        case 4: *made = ulbq::linear<4>(w, bias, exact); return;
    }
}

// The same of signs with scales that a router mixes (formats/binary_mos.py); zeros [outs], or [columns], or null.
extern "C" void ulbq_signs_linear(const uint8_t* codes, int bits, int parts, int64_t outs, int64_t columns,
                                  const uint16_t* scales, const uint8_t* none, float centre, int64_t group,
                                  const float* bias, const uint16_t* in_scales, const uint16_t* out_scales,
                                  const uint16_t* router, const uint16_t* zeros, int64_t experts, int zeros_of_inputs,
                                  int exact, const ulbq::Linear** made) {
    const Tiles w(codes, bits, parts, outs, columns, scales, none, centre, group);
    const ulbq::Mixture mixture{in_scales, out_scales, router, zeros, experts, zeros_of_inputs != 0};
    if (exact) {
        *made = new ulbq::SignsLinear<true>(w, bias, mixture);
    } else {
        *made = new ulbq::SignsLinear<false>(w, bias, mixture);
    }
}

// y [rows][outs] = x [rows][columns] times the matrix, in the type of x.
extern "C" void ulbq_multiply(const uint8_t* codes, int bits, int parts, int64_t outs, int64_t columns,
                              const uint16_t* scales, const uint8_t* zeros, float centre, int64_t group, const void* x,
                              int type, int64_t rows, void* y, int threads) {
    const Tiles w(codes, bits, parts, outs, columns, scales, zeros, centre, group);
    ulbq::multiply(&w, ulbq::Routes(rows), x, type, y, threads);
}

// y [places][outs]: of matrices of one shape, at the addresses of a table, each with the rows of its jobs (routes.h).
extern "C" void ulbq_multiply_each(const int64_t* table, int bits, int parts, int64_t outs, int64_t columns, float centre,
                                   int64_t group, const int64_t* jobs, int64_t count, const int64_t* order, int64_t places,
                                   int64_t share, const void* x, int type, void* y, int threads) {
    const std::vector<Tiles> matrices =
        ulbq::of_jobs(table, {nullptr, bits, parts, outs, columns, nullptr, nullptr, centre, group}, jobs, count);
    ulbq::multiply(matrices.data(), ulbq::Routes(jobs, count, order, places, share), x, type, y, threads);
}

// dense [columns][count]: the weights of outputs `begin` to `begin + count`, transposed; `begin` is a multiple of 64.
extern "C" void ulbq_widen(const uint8_t* codes, int bits, int parts, int64_t outs, int64_t columns,
                           const uint16_t* scales, const uint8_t* zeros, float centre, int64_t group, int64_t begin,
                           int64_t count, void* dense, int type, int threads) {
    const Tiles w(codes, bits, parts, outs, columns, scales, zeros, centre, group);
    switch (bits) {
        case 1: return ulbq::widen<1>(w, begin, count, dense, type, threads);
        case 2: return ulbq::widen<2>(w, begin, count, dense, type, threads);
        case 3: return ulbq::widen<3>(w, begin, count, dense, type, threads);
        case 4: return ulbq::widen<4>(w, begin, count, dense, type, threads);
    }
}
