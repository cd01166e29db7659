// The start of dual-binary scales: quantizers/dual_binary.py says what is looked for.
//
// While steps are tried, the lanes of a register are candidates; while they are refined, elements. A group whose levels
// are mirrored is mirrored with them, so that the second scale is always the negative one.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "lanes.h"

namespace ulbq {

struct Scales {
    float first, second;
};

// A group with its costs, filled up to whole registers with elements that cost nothing.
struct Group {
    std::vector<float> weights, costs;
    int64_t size, filled;

    explicit Group(int64_t size) : size(size), filled((size + kLanes - 1) / kLanes * kLanes) {
        weights.resize(filled);
        costs.resize(filled);
    }

    void take(const float* from, int64_t stride, const float* importance) {
        for (int64_t i = 0; i < size; ++i) weights[i] = from[i * stride];
        std::memcpy(costs.data(), importance, size * sizeof(float));
    }
};

// Which of both planes a weight is in, as 0 and the scale; for scales with second < 0 < first.
struct Rounded {
    Floats upper, lower;

    Rounded(const Floats& weight, const Floats& first, const Floats& second) {
        upper = weight > (first + second) / 2 ? first : Floats{};
        lower = weight < second / 2 + upper ? second : Floats{};
    }
};

// Squared errors of kLanes candidates, which are all positive or mirrored.
inline void errors(const Group& group, const float* firsts, const float* seconds, const float* signs, float* errors) {
    Floats first[kParts], second[kParts], sign[kParts], total[kParts] = {};
    for (int p = 0; p < kParts; ++p) {
        sign[p] = load(signs + p * kWidth);
        first[p] = load(firsts + p * kWidth);
        second[p] = load(seconds + p * kWidth);
    }
    for (int64_t begin = 0; begin < group.size; begin += kSum) {
        Floats sum[kParts] = {};
        const int64_t end = std::min(begin + kSum, group.size);
        for (int64_t i = begin; i < end; ++i) {
            for (int p = 0; p < kParts; ++p) {
                const Floats weight = group.weights[i] * sign[p];
                const Rounded rounded(weight, first[p], second[p]);
                const Floats off = rounded.upper + rounded.lower - weight;
                sum[p] += off * off * spread(group.costs[i]);
            }
        }
        for (int p = 0; p < kParts; ++p) total[p] += sum[p];
    }
    for (int p = 0; p < kParts; ++p) store(errors + p * kWidth, total[p]);
}

// The sum of kLanes sums in a fixed order.
inline float total(const Floats (&sums)[kParts]) {
    float lanes[kLanes];
    for (int p = 0; p < kParts; ++p) store(lanes + p * kWidth, sums[p]);
    for (int half = kLanes / 2; half; half /= 2) {
        for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
    }
    return lanes[0];
}

inline float error(const Group& group, Scales scales) {
    const float sign = scales.first < 0 ? -1 : 1;
    const Floats first = spread(scales.first * sign), second = spread(scales.second * sign);
    Floats sums[kParts] = {};
    for (int64_t i = 0; i < group.filled; i += kLanes) {
        for (int p = 0; p < kParts; ++p) {
            const Floats weight = load(&group.weights[i + p * kWidth]) * sign;
            const Rounded rounded(weight, first, second);
            const Floats off = rounded.upper + rounded.lower - weight;
            sums[p] += off * off * load(&group.costs[i + p * kWidth]);
        }
    }
    return total(sums);
}

// Weighted least squares with the planes fixed; the scales as they are where the system is singular.
inline Scales refit(const Group& group, Scales scales) {
    const float sign = scales.first < 0 ? -1 : 1;
    const Floats first = spread(scales.first * sign), second = spread(scales.second * sign), none{};
    Floats uppers[kParts] = {}, lowers[kParts] = {}, boths[kParts] = {}, of_uppers[kParts] = {}, of_lowers[kParts] = {};
    for (int64_t i = 0; i < group.filled; i += kLanes) {
        for (int p = 0; p < kParts; ++p) {
            const Floats weight = load(&group.weights[i + p * kWidth]) * sign, cost = load(&group.costs[i + p * kWidth]);
            const Rounded rounded(weight, first, second);
            const Floats upper = rounded.upper > 0 ? cost : none, lower = rounded.lower < 0 ? cost : none;
            uppers[p] += upper;
            lowers[p] += lower;
            boths[p] += rounded.upper > 0 ? lower : none;
            of_uppers[p] += upper * weight;
            of_lowers[p] += lower * weight;
        }
    }
    const float a = total(uppers), b = total(boths), d = total(lowers), x = total(of_uppers), y = total(of_lowers);
    const float determinant = a * d - b * b;
    if (!(determinant > 1e-6f * std::max(a * d, 1e-30f))) return scales;
    const Scales fitted{(d * x - b * y) / determinant * sign, (a * y - b * x) / determinant * sign};
    // Nearest rounding needs the second opposite to the first and smaller.
    const bool ordered = fitted.first * fitted.second < 0 && std::fabs(fitted.second) < std::fabs(fitted.first);
    return ordered ? fitted : scales;
}

// Steps of both signs in turns, each a share of the largest magnitude.
inline Scales search(const Group& group, float floor, const float* fractions, int64_t count, int refits) {
    float magnitude = 0;
    bool number = true;
    for (int64_t i = 0; i < group.size; ++i) {
        magnitude = largest(std::fabs(group.weights[i]), magnitude);
        number &= group.weights[i] == group.weights[i];
    }
    magnitude = number ? largest(magnitude, floor) : std::numeric_limits<float>::quiet_NaN();
    Scales best{magnitude, -magnitude / 2};
    float least_error = std::numeric_limits<float>::infinity();
    for (int64_t begin = 0; begin < 2 * count; begin += kLanes) {
        float first[kLanes], second[kLanes], sign[kLanes], found[kLanes];
        const int64_t own = std::min<int64_t>(kLanes, 2 * count - begin);
        for (int64_t lane = 0; lane < kLanes; ++lane) {
            const float step = fractions[std::min(begin + lane, 2 * count - 1) / 2] * magnitude;
            first[lane] = 2 * step, second[lane] = -step, sign[lane] = lane % 2 ? -1 : 1;
        }
        errors(group, first, second, sign, found);
        for (int64_t lane = 0; lane < own; ++lane) {
            if (!(found[lane] < least_error)) continue;
            least_error = found[lane];
            best = Scales{sign[lane] * first[lane], sign[lane] * second[lane]};
        }
    }
    for (int turn = 0; turn < refits; ++turn) {
        const Scales fitted = refit(group, best);
        const float found = error(group, fitted);
        if (!(found < least_error)) break;  // the next one would be the same
        least_error = found, best = fitted;
    }
    return best;
}

}  // namespace ulbq

using namespace ulbq;

// Weights lie at row * row_stride + column * column_stride; scales [2][rows][groups].
extern "C" void ulbq_search_scales(const float* weights, int64_t rows, int64_t columns, int64_t row_stride,
                                   int64_t column_stride, const float* importance, int64_t size, float floor,
                                   const float* fractions, int64_t count, int refits, float* scales, int threads) {
    const int64_t groups = columns / size;
#pragma omp parallel num_threads(threads)
    {
        Group group(size);
#pragma omp for schedule(dynamic, 16)
        for (int64_t row = 0; row < rows; ++row) {
            for (int64_t at = 0; at < groups; ++at) {
                group.take(weights + row * row_stride + at * size * column_stride, column_stride, importance + at * size);
                const Scales found = search(group, floor, fractions, count, refits);
                scales[row * groups + at] = found.first;
                scales[(rows + row) * groups + at] = found.second;
            }
        }
    }
}
