// Products with trellis codes (the format `trellis`), read where they are stored.
//
// Thirty-two elements are decoded at a time, in lanes of 16 bits: of two threads t of a tile's order (formats/trellis.py)
// that share one lane of 32 bits, so that both belong to the same output. A step takes the same element of every thread:
// its state is a window over two neighbouring units of 16 bits, its product with the multiplier is made in halves, and the
// sum of the four bytes is multiplied by inputs of 16 bits (or twice 16). All sums over 64 columns are exact; they are
// scaled in float32 behind them.

#include <omp.h>

#include <cmath>

#include "linear.h"
#include "routes.h"

namespace ulbq::trellis {

constexpr int64_t kSide = 16;       // of a tile
constexpr int64_t kUnit = 128;      // outputs that one task has to itself
constexpr int64_t kTilesOfChunk = kChunk / kSide;
constexpr int kMiddle = 1024;       // added to every sum of bytes
constexpr int kHalfway = 510;       // the mean sum of four bytes
constexpr int64_t kRowsAtOnce = 192;  // that pass over decoded elements; their results stay in the second cache

struct Trellis {
    const uint8_t* codes;
    int64_t outs, columns;
    uint32_t multiplier;
    int state_bits;
    float scale, shift;  // value = (kMiddle + sum) * scale + shift
};

// Inputs r of the lanes of a step: (0, 1, 8, 9)[element mod 4], and 2 (t mod 4).
constexpr int kFirst[4] = {0, 1, 8, 9};

inline __m512i all16(int value) { return _mm512_set1_epi16(static_cast<short>(value)); }

// 16 bits of each pair of units `high`, `low` that end `count` bits, at most 15, behind the first one.
inline __m512i window(__m512i high, __m512i low, __m512i count) {
#ifdef __AVX512VBMI2__
    return _mm512_shldv_epi16(high, low, count);
#else
    return _mm512_or_si512(_mm512_sllv_epi16(high, count), _mm512_srlv_epi16(low, _mm512_sub_epi16(all16(16), count)));
#endif
}

// Which of up to 64 units each lane takes, by a rule of the lane's thread; units lie in words, the lower half behind.
template <class Rule>
inline __m512i units(const Rule& rule) {
    uint16_t lanes[32];
    for (int lane = 0; lane < 32; ++lane) lanes[lane] = static_cast<uint16_t>(rule(lane ^ 1) ^ 1);
    return _mm512_loadu_si512(lanes);
}

// Counts of even and odd threads.
inline __m512i counts(int even, int odd) { return _mm512_set1_epi32(even << 16 | odd); }

// Sums of the four bytes of states' products; states of 16 bits need no mask.
template <bool Masked>
struct ByteSums {
    ByteSums(uint32_t multiplier, int state_bits)
        : low(all16(multiplier & 0xffff)), high(all16(multiplier >> 16)), mask(all16((1 << state_bits) - 1)) {}

    __m512i operator()(__m512i state) const {
        if (Masked) state = _mm512_and_si512(state, mask);
        const __m512i below = _mm512_mullo_epi16(state, low);
        const __m512i above = _mm512_add_epi16(_mm512_mulhi_epu16(state, low), _mm512_mullo_epi16(state, high));
        const __m512i one = _mm512_set1_epi8(1);
        return _mm512_add_epi16(_mm512_maddubs_epi16(below, one), _mm512_maddubs_epi16(above, one));
    }

    __m512i low, high, mask;
};

// Decoders by bits: `group` outputs at a time, in `kSteps` registers; of each the half of a tile's outputs that it
// belongs to, and which inputs it takes.
template <int Bits>
struct Decoder;

template <>
struct Decoder<1> {
    static constexpr int kSteps = 16, kGroup = 32;
    static constexpr int half(int step) { return step % 8 / 4; }
    static constexpr int inputs(int step) { return step / 8 * 4 + step % 4; }

    // A unit is two threads; a register has two tiles.
    const __m512i before = units([](int unit) { return (unit / 16 * 16) + (unit + 15) % 16; });

    template <class Value, class Take>
    inline __attribute__((always_inline)) void run(const uint8_t* tile, bool whole, const Value& value, const Take& take) const {
        const __m512i here = _mm512_maskz_loadu_epi64(whole ? 0xff : 0xf, tile);
        const __m512i last = _mm512_permutexvar_epi16(before, here);
#pragma GCC unroll 16
        for (int step = 0; step < kSteps; ++step) {
            take(step, value(step == 15 ? here : window(last, here, all16(step + 1))));
        }
    }
};

template <>
struct Decoder<2> {
    static constexpr int kSteps = 8, kGroup = 16;
    static constexpr int half(int step) { return step / 4; }
    static constexpr int inputs(int step) { return step % 4; }

    const __m512i before = units([](int unit) { return (unit + 31) % 32; });

    template <class Value, class Take>
    inline __attribute__((always_inline)) void run(const uint8_t* tile, bool, const Value& value, const Take& take) const {
        const __m512i here = _mm512_loadu_si512(tile), last = _mm512_permutexvar_epi16(before, here);
#pragma GCC unroll 8
        for (int step = 0; step < kSteps; ++step) {
            take(step, value(step == 7 ? here : window(last, here, all16(2 * step + 2))));
        }
    }
};

template <>
struct Decoder<3> : Decoder<2> {
    // Threads begin on a unit or in the middle of one: theirs, that before, that behind; and where odd threads are one
    // unit further.
    const __m512i before = units([](int t) { return (t * 3 / 2 + 47) % 48; });
    const __m512i own = units([](int t) { return t * 3 / 2; });
    const __m512i behind = units([](int t) { return t * 3 / 2 + 1; });
    const __m512i first = units([](int t) { return (t * 3 / 2 + 47 + t % 2) % 48; });
    const __m512i second = units([](int t) { return t * 3 / 2 + t % 2; });

    template <class Value, class Take>
    inline __attribute__((always_inline)) void run(const uint8_t* tile, bool, const Value& value, const Take& take) const {
        const __m512i here = _mm512_loadu_si512(tile);
        const __m512i rest = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(tile + 64)));
        const auto pick = [&](__m512i which) { return _mm512_permutex2var_epi16(here, which, rest); };
        const __m512i p = pick(before), q = pick(own), r = pick(behind), a = pick(first), b = pick(second);
        take(0, value(window(p, q, counts(3, 11))));
        take(1, value(window(p, q, counts(6, 14))));
        take(2, value(window(a, b, counts(9, 1))));
        take(3, value(window(a, b, counts(12, 4))));
        take(4, value(window(a, b, counts(15, 7))));
        take(5, value(window(q, r, counts(2, 10))));
        take(6, value(window(q, r, counts(5, 13))));
        take(7, value(window(b, r, counts(8, 0))));
    }
};

template <>
struct Decoder<4> : Decoder<2> {
    const __m512i before = units([](int t) { return (2 * t + 63) % 64; });
    const __m512i own = units([](int t) { return 2 * t; });
    const __m512i behind = units([](int t) { return 2 * t + 1; });

    template <class Value, class Take>
    inline __attribute__((always_inline)) void run(const uint8_t* tile, bool, const Value& value, const Take& take) const {
        const __m512i here = _mm512_loadu_si512(tile), rest = _mm512_loadu_si512(tile + 64);
        const auto pick = [&](__m512i which) { return _mm512_permutex2var_epi16(here, which, rest); };
        const __m512i p = pick(before), q = pick(own), r = pick(behind);
#pragma GCC unroll 3
        for (int step = 0; step < 3; ++step) take(step, value(window(p, q, all16(4 * step + 4))));
        take(3, value(q));
#pragma GCC unroll 3
        for (int step = 4; step < 7; ++step) take(step, value(window(q, r, all16(4 * step - 12))));
        take(7, value(r));
    }
};

// Inputs as integers of 16 bits, or of 24 in two parts, in the order in which a step's lanes take them.
//
// 64 columns of a row share one factor, x = factor * v with v = values[0] or 256 * values[0] + values[1]. What is not
// finite makes a factor, and with it the row's results, NaN. `starts` are what sums begin with in even and in odd lanes,
// so that they are those of elements less kHalfway; `totals` are the sums of rows, as rounded.
template <int Steps, int Parts>
struct Inputs {
    Inputs(const float* x, int64_t rows, int64_t columns)
        : x(x), rows(rows), columns(columns), chunks((columns + kChunk - 1) / kChunk),
          values(buffer<int16_t>(rows * chunks * Parts * kChunk)), starts(buffer<int32_t>(rows * chunks * Parts * 2)),
          factors(buffer<float>(rows * chunks)), totals(buffer<float>(rows)) {}

    int64_t place(int64_t row, int64_t chunk, int part) const { return (chunk * rows + row) * Parts + part; }

    __m512i start(int64_t row, int64_t chunk, int part) const {
        int64_t both;
        std::memcpy(&both, starts.get() + 2 * place(row, chunk, part), sizeof both);
        return _mm512_set1_epi64(both);
    }

    // The lanes of a step, by its index among those of a tile's 16 columns.
    __m512i lanes(int64_t row, int64_t chunk, int part, int64_t tile, int index) const {
        const int16_t* from = values.get() + place(row, chunk, part) * kChunk + tile * kSide;
        if (Steps == 16) {
            int32_t two;
            std::memcpy(&two, from + 2 * index, sizeof two);
            return _mm512_set1_epi32(two);
        }
        int64_t four;
        std::memcpy(&four, from + 4 * index, sizeof four);
        return _mm512_set1_epi64(four);
    }

    void round_row(int64_t row) {
        totals[row] = 0.0f;
        for (int64_t chunk = 0; chunk < chunks; ++chunk) round_chunk(row, chunk);
    }

    const float* x;
    const int64_t rows, columns, chunks;
    const Buffer<int16_t> values;
    const Buffer<int32_t> starts;
    const Buffer<float> factors, totals;

  private:
    void round_chunk(int64_t row, int64_t chunk) {
        const Fixed fixed(x, kFloat32, row, columns, chunk, Parts == 1 ? 32600.0f : 8345000.0f);
        __m512i total[Parts] = {};
        for (int quarter = 0; quarter < 4; ++quarter) {
            const __m512i whole = fixed.whole[quarter];
            // The nearest multiple of 256 leaves a digit from -128 to 127.
            const __m512i above = _mm512_srai_epi32(_mm512_add_epi32(whole, _mm512_set1_epi32(128)), 8);
            const __m512i parts[2] = {Parts == 1 ? whole : above, _mm512_sub_epi32(whole, _mm512_slli_epi32(above, 8))};
            for (int part = 0; part < Parts; ++part) {
                total[part] = _mm512_add_epi32(total[part], parts[part]);
                int16_t* to = values.get() + place(row, chunk, part) * kChunk + quarter * 16;
                const __m512i turned = _mm512_permutexvar_epi32(order(), parts[part]);
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(turned));
            }
        }
        factors[chunk * rows + row] = fixed.factor;
        float sum = 0.0f;
        for (int part = 0; part < Parts; ++part) {
            // Odd lanes of 32 bits take the inputs 4 to 7 and 12 to 15; with one bit all lanes take all.
            const int32_t even = _mm512_mask_reduce_add_epi32(0x0f0f, total[part]);
            const int32_t odd = _mm512_mask_reduce_add_epi32(0xf0f0, total[part]);
            int32_t* to = starts.get() + 2 * place(row, chunk, part);
            to[0] = -kHalfway * (Steps == 16 ? even + odd : even);
            to[1] = -kHalfway * (Steps == 16 ? even + odd : odd);
            sum = 256.0f * sum + static_cast<float>(even + odd);
        }
        totals[row] += fixed.factor * sum;
    }

    // Odd threads lie first: theirs are the inputs 2 further, or with one bit 4; odd lanes' are 4 further.
    static __m512i order() {
        int32_t from[16];
        for (int index = 0; index < 16; ++index) {
            if (Steps == 16) {
                from[index] = kFirst[index / 2 % 4] + 2 * (index / 8) + 4 * (1 - index % 2);
            } else {
                from[index] = kFirst[index / 4] + 4 * (index % 4 / 2) + 2 * (1 - index % 2);
            }
        }
        return _mm512_loadu_si512(from);
    }
};

// The tiles of a group of outputs in a chunk of columns.
struct Stripe {
    const uint8_t* begin;
    int64_t stride, count;  // to the next one, and how many
    bool whole;             // whether a register of two tiles has both
};

// One matrix and the decoder of its bits.
template <int Bits, bool Masked>
struct Product {
    static constexpr int kSteps = Decoder<Bits>::kSteps;
    static constexpr int64_t kGroup = Decoder<Bits>::kGroup;
    static constexpr int64_t kGroups = kUnit / kGroup;

    explicit Product(const Trellis& w)
        : w(w), rest((kMiddle + kHalfway) * double(w.scale) + w.shift), value(w.multiplier, w.state_bits) {}

    Stripe stripe(const uint8_t* codes, int64_t output, int64_t chunk) const {
        const int64_t bytes = 32 * Bits, row = chunk * kTilesOfChunk, left = w.columns / kSide - row;
        const int64_t stride = w.outs / kSide * bytes;
        return {codes + row * stride + output / kSide * bytes, stride, left < kTilesOfChunk ? left : kTilesOfChunk,
                output + kGroup <= w.outs};
    }

    template <class Take>
    inline __attribute__((always_inline)) void decode(const Stripe& at, int64_t tile, const Take& take) const {
        const uint8_t* from = at.begin + tile * at.stride;
        _mm_prefetch(reinterpret_cast<const char*>(from + kTilesOfChunk * at.stride), _MM_HINT_T0);
        decoder.run(from, at.whole, value, take);
    }

    // Add the sums of a chunk's products to `result` [2][16].
    template <int Parts>
    void add(const Inputs<kSteps, Parts>& x, int64_t row, int64_t chunk, const __m512i (&sum)[Parts][2], float* result) const {
        const __m512 factor = all(w.scale * x.factors[chunk * x.rows + row]);
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
            __m512 product = _mm512_cvtepi32_ps(sum[Parts - 1][half]);
            if (Parts == 2) product = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[0][half]), all(256.0f), product);
            _mm512_store_ps(result + 16 * half, _mm512_fmadd_ps(product, factor, _mm512_load_ps(result + 16 * half)));
        }
    }

    // One row: nothing that is decoded is stored.
    template <int Parts>
    void one_row(const Inputs<kSteps, Parts>& x, const Stripe& at, int64_t chunk, int64_t row, float* result) const {
        __m512i sum[Parts][2];
        for (int part = 0; part < Parts; ++part) sum[part][0] = sum[part][1] = x.start(row, chunk, part);
        for (int64_t tile = 0; tile < at.count; ++tile) {
            decode(at, tile, [&](int step, __m512i element) {
#pragma GCC unroll 2
                for (int part = 0; part < Parts; ++part) {
                    __m512i& to = sum[part][decoder.half(step)];
                    to = _mm512_dpwssd_epi32(to, element, x.lanes(row, chunk, part, tile, decoder.inputs(step)));
                }
            });
        }
        add(x, row, chunk, sum, result);
    }

    // A few rows and what was decoded of `count` tiles.
    template <int Parts, int Rows>
    void some_rows(const Inputs<kSteps, Parts>& x, const __m512i* decoded, int64_t count, int64_t chunk, int64_t row,
                   float* result) const {
        __m512i sum[Rows][Parts][2];
        for (int r = 0; r < Rows; ++r) {
            for (int part = 0; part < Parts; ++part) sum[r][part][0] = sum[r][part][1] = x.start(row + r, chunk, part);
        }
        for (int64_t tile = 0; tile < count; ++tile) {
#pragma GCC unroll 16
            for (int step = 0; step < kSteps; ++step) {
                const __m512i element = _mm512_load_si512(decoded + tile * kSteps + step);
#pragma GCC unroll 4
                for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 2
                    for (int part = 0; part < Parts; ++part) {
                        __m512i& to = sum[r][part][Decoder<Bits>::half(step)];
                        const __m512i input = x.lanes(row + r, chunk, part, tile, Decoder<Bits>::inputs(step));
                        to = _mm512_dpwssd_epi32(to, element, input);
                    }
                }
            }
        }
        for (int r = 0; r < Rows; ++r) add(x, row + r, chunk, sum[r], result + 32 * r);
    }

    template <int Parts>
    void many_rows(const Inputs<kSteps, Parts>& x, const Stripe& at, int64_t chunk, int64_t begin, int64_t end, float* result) const {
        alignas(64) __m512i decoded[kTilesOfChunk * kSteps];
        for (int64_t tile = 0; tile < at.count; ++tile) {
            decode(at, tile, [&](int step, __m512i element) { decoded[tile * kSteps + step] = element; });
        }
        constexpr int kFew = 4 / Parts;
        int64_t row = begin;
        for (; row + kFew <= end; row += kFew) {
            some_rows<Parts, kFew>(x, decoded, at.count, chunk, row, result + 32 * (row - begin));
        }
        for (; row < end; ++row) some_rows<Parts, 1>(x, decoded, at.count, chunk, row, result + 32 * (row - begin));
    }

    // `kGroup` outputs of a row from its sums [2][16]: of more than one bit two lanes each, else a tile in half a register.
    void finish(const float* sums, float total, float* to) const {
        const __m512 a = _mm512_load_ps(sums), b = _mm512_load_ps(sums + 16), shift = all(rest * total);
        if (Bits == 1) {
            _mm512_storeu_ps(to, _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), shift));
            _mm512_storeu_ps(to + 16, _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0xee), shift));
            return;
        }
        const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
        const __m512 both = _mm512_add_ps(_mm512_permutex2var_ps(a, even, b),
                                          _mm512_permutex2var_ps(a, _mm512_add_epi32(even, _mm512_set1_epi32(1)), b));
        _mm512_storeu_ps(to, _mm512_add_ps(both, shift));
    }

    // `kUnit` outputs of a matrix and the rows from `begin` to `end`, [end - begin][outs] of y; `result` is for its sums.
    template <int Parts>
    void multiply_unit(const uint8_t* codes, const Inputs<kSteps, Parts>& x, int64_t unit, int64_t begin, int64_t end,
                       float* result, float* y) const {
        const int64_t last = unit + kUnit < w.outs ? unit + kUnit : w.outs, size = 32 * (end - begin);
        std::memset(result, 0, kGroups * size * sizeof(float));
        for (int64_t chunk = 0; chunk < x.chunks; ++chunk) {
            float* to = result;
            for (int64_t output = unit; output < last; output += kGroup, to += size) {
                if (end - begin == 1) {
                    one_row(x, stripe(codes, output, chunk), chunk, begin, to);
                } else {
                    many_rows(x, stripe(codes, output, chunk), chunk, begin, end, to);
                }
            }
        }
        for (int64_t row = begin; row < end; ++row) {
            store_row(result + 32 * (row - begin), size, x.totals[row], unit, last, y + (row - begin) * w.outs);
        }
    }

    // The matrix of every job, its codes at the first of `kinds` addresses of a table, with the rows at the job's places.
    template <int Parts>
    void multiply(const int64_t* table, int64_t kinds, const Routes& routes, const float* inputs, float* y, int threads) const {
        Inputs<kSteps, Parts> x(inputs, routes.places, w.columns);
        const int64_t rows = routes.most(), blocks = (rows + kRowsAtOnce - 1) / kRowsAtOnce;
        const int64_t most = rows < kRowsAtOnce ? rows : kRowsAtOnce;
#pragma omp parallel num_threads(threads)
        {
#pragma omp for schedule(static)
            for (int64_t place = 0; place < routes.places; ++place) {
                if (routes.owner[place] >= 0) x.round_row(place);
            }
            const Buffer<float> result = buffer<float>(kGroups * most * 32);
#pragma omp for schedule(dynamic, 1) collapse(3) nowait
            for (int64_t job = 0; job < routes.count; ++job) {
                for (int64_t block = 0; block < blocks; ++block) {
                    for (int64_t unit = 0; unit < w.outs; unit += kUnit) {
                        const int64_t begin = routes.begin(job) + block * kRowsAtOnce, last = routes.end(job);
                        const int64_t end = begin + kRowsAtOnce < last ? begin + kRowsAtOnce : last;
                        if (begin >= end) continue;
                        const uint8_t* codes = address<uint8_t>(table, kinds * routes.matrix(job));
                        multiply_unit(codes, x, unit, begin, end, result.get(), y + begin * w.outs);
                    }
                }
            }
        }
    }

    void store_row(const float* sums, int64_t size, float total, int64_t begin, int64_t end, float* y) const {
        for (int64_t output = begin; output < end; output += kGroup, sums += size) {
            float found[kGroup];
            finish(sums, total, found);
            const int64_t count = end - output < kGroup ? end - output : kGroup;
            std::memcpy(y + output, found, count * sizeof(float));
        }
    }

    // Elements of outputs `begin` to `begin + count`, transposed: dense [columns][count].
    template <int Type>
    void widen(int64_t begin, int64_t count, void* dense, int threads) const {
        constexpr int64_t kSize = Type == kFloat32 ? 4 : 2;
#pragma omp parallel for num_threads(threads) schedule(static) collapse(2)
        for (int64_t row = 0; row < w.columns / kSide; ++row) {
            for (int64_t unit = 0; unit < count; unit += kUnit) {
                // The rows of a dense matrix lie where they drive each other out of the cache: not 32 bytes at a time.
                alignas(64) uint8_t block[kSide * kUnit * kSize];
                const int64_t wide = unit + kUnit < count ? kUnit : count - unit;
                for (int64_t at = 0; at < wide; at += kGroup) widen_group<Type>(row, begin + unit + at, block + at * kSize);
                for (int64_t r = 0; r < kSide; ++r) {
                    uint8_t* to = static_cast<uint8_t*>(dense) + ((row * kSide + r) * count + unit) * kSize;
                    std::memcpy(to, block + r * kUnit * kSize, wide * kSize);
                }
            }
        }
    }

  private:
    // Of each output the lane of its first thread in a step's register, and in that of four steps later.
    static __m512i places() {
        uint16_t lanes[32];
        for (int output = 0; output < 32; ++output) {
            const int within = output % 8, later = output % 16 / 8;
            lanes[output] = static_cast<uint16_t>((Bits == 1 ? output / 16 * 16 + 2 * within : 4 * within) + 32 * later);
        }
        return _mm512_loadu_si512(lanes);
    }

    // A group's outputs of sixteen columns: rows of kUnit.
    template <int Type>
    inline __attribute__((always_inline)) void widen_group(int64_t row, int64_t output, void* to) const {
        const __m512i lanes = places();
        __m512i element[kSteps];
        decode(stripe(w.codes, output, row / kTilesOfChunk), row % kTilesOfChunk, [&](int step, __m512i found) { element[step] = found; });
#pragma GCC unroll 16
        for (int r = 0; r < kSide; ++r) {
            // Which of the four inputs of a thread, and of which thread of four.
            const int which = r % 2 + 2 * (r / 8), thread = r % 8 / 2;
            const int step = Bits == 1 ? thread % 2 * 8 + which : which;
            const __m512i from = _mm512_add_epi16(lanes, all16((Bits == 1 ? thread / 2 : thread) ^ 1));
            const __m512i sums = _mm512_permutex2var_epi16(element[step], from, element[step + 4]);
            store_values<Type>(_mm512_castsi512_si256(sums), to, r * kUnit);
            if (Bits == 1) store_values<Type>(_mm512_extracti64x4_epi64(sums, 1), to, r * kUnit + 16);
        }
    }

    template <int Type>
    void store_values(__m256i sums, void* to, int64_t index) const {
        const __m512 whole = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_cvtepi16_epi32(sums), _mm512_set1_epi32(kMiddle)));
        store_floats(to, Type, index, 0xffff, plus(times(whole, all(w.scale)), all(w.shift)));
    }

    const Trellis w;
    const float rest;  // the value of a sum of kHalfway
    const ByteSums<Masked> value;
    const Decoder<Bits> decoder;
};

template <class Run>
void by_bits(const Trellis& w, int bits, const Run& run) {
    const auto with = [&](auto masked) {
        constexpr bool kMasked = decltype(masked)::value;
        switch (bits) {
            case 1: return run(Product<1, kMasked>(w));
            case 2: return run(Product<2, kMasked>(w));
            case 3: return run(Product<3, kMasked>(w));
            case 4: return run(Product<4, kMasked>(w));
        }
    };
    w.state_bits == 16 ? with(std::false_type()) : with(std::true_type());
}

// A block of 16 to 128 numbers times the Hadamard matrix of its width, not normalised.
inline void hadamard(float* block, int64_t width) {
    __m512 lane[8];
    const int64_t count = width / 16;
    const __m512i index = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (int64_t i = 0; i < count; ++i) {
        lane[i] = _mm512_loadu_ps(block + 16 * i);
#pragma GCC unroll 4
        for (int step = 1; step < 16; step *= 2) {
            const __m512i other = _mm512_xor_si512(index, _mm512_set1_epi32(step));
            const __mmask16 second = _mm512_test_epi32_mask(index, _mm512_set1_epi32(step));
            const __m512 swapped = _mm512_permutexvar_ps(other, lane[i]);
            lane[i] = _mm512_mask_sub_ps(_mm512_add_ps(lane[i], swapped), second, swapped, lane[i]);
        }
    }
    for (int64_t step = 1; step < count; step *= 2) {
        for (int64_t i = 0; i < count; ++i) {
            if (i & step) continue;
            const __m512 sum = _mm512_add_ps(lane[i], lane[i + step]);
            lane[i + step] = _mm512_sub_ps(lane[i], lane[i + step]);
            lane[i] = sum;
        }
    }
    for (int64_t i = 0; i < count; ++i) _mm512_storeu_ps(block + 16 * i, lane[i]);
}

// Sixteen numbers, from `at` on, of the sum of all blocks, weighted by row `i` of `mix`.
inline __m512 mixed(const float* mix, const float* blocks, int64_t count, int64_t block, int64_t i, int64_t at) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t j = 0; j < count; ++j) {
        sum = _mm512_fmadd_ps(all(mix[i * count + j]), _mm512_load_ps(blocks + j * block + at), sum);
    }
    return sum;
}

// Each of `count` blocks becomes a sum of all, weighted by a row of `mix`.
inline void mix_blocks(const float* mix, const float* blocks, int64_t count, int64_t block, float* to) {
    for (int64_t i = 0; i < count; ++i) {
        for (int64_t at = 0; at < block; at += 16) _mm512_store_ps(to + i * block + at, mixed(mix, blocks, count, block, i, at));
    }
}

// One end of a product: a transform of each row, of `width` columns in blocks of `block`.
struct Turn {
    struct End {
        int64_t from, to;  // rows; from -1 where there is nothing to do
        const uint16_t *before, *after;
    };

    int64_t width, block;
    const float* mix;  // [width / block][width / block], null where blocks are not mixed

    int64_t span() const { return mix ? width : block; }

    // Columns `begin` to `begin + span()` of a row: to = (x * before) · H * after; `turned` and `mixed` are for one span.
    template <int Type>
    void run(const void* x, const End& end, void* to, int to_type, int64_t begin, float* turned, float* mixed) const {
        const __m512 norm = all(1.0f / std::sqrt(static_cast<float>(block)));
        for (int64_t at = 0; at < span(); at += 16) {
            __m512 some = load_floats(x, Type, end.from * width + begin + at, 0xffff);
            if (end.before) some = _mm512_mul_ps(some, load_floats(end.before, kFloat16, begin + at, 0xffff));
            _mm512_store_ps(turned + at, some);
        }
        for (int64_t at = 0; at < span(); at += block) hadamard(turned + at, block);
        if (mix) mix_blocks(mix, turned, width / block, block, mixed);
        for (int64_t at = 0; at < span(); at += 16) {
            __m512 some = _mm512_mul_ps(_mm512_load_ps((mix ? mixed : turned) + at), norm);
            if (end.after) some = _mm512_mul_ps(some, load_floats(end.after, kFloat16, begin + at, 0xffff));
            store_floats(to, to_type, end.to * width + begin + at, 0xffff, some);
        }
    }

    // Rows in turn; `find` tells where it is read, where it is written, and what it is multiplied with on either side.
    template <class Find>
    void run(const void* x, int type, void* to, int to_type, int64_t rows, const Find& find, int threads) const {
        by_type(type, [&](auto from_type) {
#pragma omp parallel num_threads(threads)
            {
                const Buffer<float> turned = buffer<float>(span()), mixed = buffer<float>(mix ? span() : 0);
#pragma omp for schedule(static) collapse(2)
                for (int64_t row = 0; row < rows; ++row) {
                    for (int64_t begin = 0; begin < width; begin += span()) {
                        const End end = find(row);
                        if (end.from < 0) continue;
                        run<decltype(from_type)::value>(x, end, to, to_type, begin, turned.get(), mixed.get());
                    }
                }
            }
        });
    }
};

// One end of a product of one row, by a team: each thread turns all blocks, which is little work, and mixes some.
struct Side {
    int64_t width, block;
    const float* mix;
    const uint16_t *before, *after;

    // Calls `put` with sixteen of the results at a time; behind the loop there is no barrier.
    template <class Put>
    void run(const float* x, const Put& put) const {
        const Buffer<float> turned = buffer<float>(width);
        for (int64_t at = 0; at < width; at += 16) {
            __m512 some = _mm512_loadu_ps(x + at);
            if (before) some = _mm512_mul_ps(some, load_floats(before, kFloat16, at, 0xffff));
            _mm512_store_ps(turned.get() + at, some);
        }
        for (int64_t at = 0; at < width; at += block) hadamard(turned.get() + at, block);
        const __m512 norm = all(1.0f / std::sqrt(static_cast<float>(block)));
        const int64_t count = width / block;
#pragma omp for schedule(static) nowait
        for (int64_t i = 0; i < count; ++i) {
            for (int64_t at = 0; at < block; at += 16) {
                const int64_t place = i * block + at;
                __m512 some = mix ? mixed(mix, turned.get(), count, block, i, at) : _mm512_load_ps(turned.get() + place);
                some = _mm512_mul_ps(some, norm);
                if (after) some = _mm512_mul_ps(some, load_floats(after, kFloat16, place, 0xffff));
                put(place, some);
            }
        }
    }
};

// Trellis codes and one row, rounded to digits of as many parts.
template <class Of, int Parts>
struct TrellisLinear : Linear {
    TrellisLinear(const Of& product, const uint8_t* codes, const Side& in, const Side& out, const float* bias)
        : Linear(out.width, in.width, bias), product(product), codes(codes), in(in), out(out) {}

    int64_t scratch() const override { return (columns + outs + 31) / 16 * 16; }

    void multiply(const float* x, float* y, Own&, float* shared) const override {
        float *inner = shared, *found = shared + (columns + 15) / 16 * 16;
        in.run(x, [&](int64_t at, __m512 value) { _mm512_storeu_ps(inner + at, value); });
#pragma omp barrier
        Inputs<Of::kSteps, Parts> rounded(inner, 1, columns);
        rounded.round_row(0);
        share((outs + kUnit - 1) / kUnit, [&](int64_t unit) {
            alignas(64) float result[Of::kGroups * 32];
            product.template multiply_unit<Parts>(codes, rounded, unit * kUnit, 0, 1, result, found);
        });
#pragma omp barrier
        out.run(found, [&](int64_t at, __m512 value) { put(y, at, value); });
    }

  private:
    const Of product;
    const uint8_t* const codes;
    const Side in, out;
};

}  // namespace ulbq::trellis

using namespace ulbq;
using namespace ulbq::trellis;

// y [rows][outs] = x [rows][columns] times the transpose of the inner matrix. Of `parts` 1, inputs are rounded to 16 bits
// of the largest of 64 columns; of 2, to 24.
extern "C" void ulbq_multiply_trellis(const uint8_t* codes, int bits, int state_bits, uint32_t multiplier, float scale, float shift,
                             int64_t outs, int64_t columns, const float* x, int64_t rows, int parts, float* y, int threads) {
    by_bits({codes, outs, columns, multiplier, state_bits, scale, shift}, bits, [&](const auto& product) {
        const Routes routes(rows);
        const int64_t table[1] = {static_cast<int64_t>(reinterpret_cast<intptr_t>(codes))};
        parts == 1 ? product.template multiply<1>(table, 1, routes, x, y, threads) : product.template multiply<2>(table, 1, routes, x, y, threads);
    });
}

// y [places][outs]: x · diag(su) · H, times the transpose of the inner matrix, · H · diag(sv), of matrices of one shape,
// at the addresses of a table [matrices][codes, su, sv], each with the rows of its jobs (routes.h). The transforms are
// those of ulbq_turn.
extern "C" void ulbq_trellis_each(const int64_t* table, int bits, int state_bits, uint32_t multiplier, float scale, float shift,
                                  int64_t outs, int64_t columns, int64_t in_block, const float* in_mix, int64_t out_block,
                                  const float* out_mix, const int64_t* jobs, int64_t count, const int64_t* order, int64_t places,
                                  int64_t share, const void* x, int type, int parts, void* y, int threads) {
    const Routes routes(jobs, count, order, places, share);
    const Buffer<float> inner = buffer<float>(places * columns), found = buffer<float>(places * outs);
    const auto vector = [&](int64_t place, int kind) {
        return address<uint16_t>(table, 3 * routes.matrix(routes.owner[place]) + kind);
    };
    const auto entering = [&](int64_t place) -> Turn::End {
        if (routes.owner[place] < 0) return {-1, -1, nullptr, nullptr};
        return {routes.input(place), place, vector(place, 1), nullptr};
    };
    Turn{columns, in_block, in_mix}.run(x, type, inner.get(), kFloat32, places, entering, threads);
    by_bits({nullptr, outs, columns, multiplier, state_bits, scale, shift}, bits, [&](const auto& product) {
        parts == 1 ? product.template multiply<1>(table, 3, routes, inner.get(), found.get(), threads)
                   : product.template multiply<2>(table, 3, routes, inner.get(), found.get(), threads);
    });
    const auto leaving = [&](int64_t place) -> Turn::End {
        if (routes.owner[place] < 0) return {-1, -1, nullptr, nullptr};
        return {place, routes.output(place), nullptr, vector(place, 2)};
    };
    Turn{outs, out_block, out_mix}.run(found.get(), kFloat32, y, type, places, leaving, threads);
}

// A matrix for ulbq_decode, with vectors and transforms as of ulbq_trellis_each; `exact` inputs are rounded to 24 bits of
// their largest, others to 16.
extern "C" void ulbq_trellis_linear(const uint8_t* codes, int bits, int state_bits, uint32_t multiplier, float scale, float shift,
                                    int64_t outs, int64_t columns, const uint16_t* su, const uint16_t* sv, int64_t in_block,
                                    const float* in_mix, int64_t out_block, const float* out_mix, const float* bias, int exact,
                                    const Linear** made) {
    const Side in{columns, in_block, in_mix, su, nullptr}, out{outs, out_block, out_mix, nullptr, sv};
    const Trellis w{codes, outs, columns, multiplier, state_bits, scale, shift};
    by_bits(w, bits, [&](const auto& product) {
        using Of = std::decay_t<decltype(product)>;
        if (exact) {
            *made = new TrellisLinear<Of, 2>(product, codes, in, out, bias);
        } else {
            *made = new TrellisLinear<Of, 1>(product, codes, in, out, bias);
        }
    });
}

// dense [columns][count]: the inner matrix's rows `begin` to `begin + count`, transposed; both are multiples of 32, or the
// end of the matrix.
extern "C" void ulbq_widen_trellis(const uint8_t* codes, int bits, int state_bits, uint32_t multiplier, float scale, float shift,
                                   int64_t outs, int64_t columns, int64_t begin, int64_t count, void* dense, int type, int threads) {
    by_bits({codes, outs, columns, multiplier, state_bits, scale, shift}, bits, [&](const auto& product) {
        by_type(type, [&](auto float_type) { product.template widen<decltype(float_type)::value>(begin, count, dense, threads); });
    });
}

// to [rows][width] = (x * before) · H * after, H the normalised Hadamard matrix of each `block` columns; with `mix`
// [width / block][width / block], the blocks are mixed by it, too. Either vector of float16 may be null.
extern "C" void ulbq_turn(const void* x, int type, int64_t rows, int64_t width, int64_t block, const float* mix,
                          const uint16_t* before, const uint16_t* after, void* to, int to_type, int threads) {
    const auto find = [&](int64_t row) -> Turn::End { return {row, row, before, after}; };
    Turn{width, block, mix}.run(x, type, to, to_type, rows, find, threads);
}
