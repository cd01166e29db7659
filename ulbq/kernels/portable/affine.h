// The affine grid of one group: every candidate range is tried while the group lies in the nearest cache.
//
// The lanes of a register are candidates, its time is the group's elements. A group of any size fits, no sum is taken
// across lanes, and the sums are the same on every machine.

#pragma once

#include <algorithm>
#include <limits>
#include <memory>

#include "lanes.h"

namespace ulbq {

// What is looked for, the same for all groups.
struct Search {
    float top;             // largest code
    float centre;          // zero point of a symmetric grid; negative where zero points are looked for
    float floor;           // smallest scale
    const float* factors;  // shares of the range to try
    int64_t count;

    bool symmetric() const { return centre >= 0; }
};

struct Grid {
    float scale, zero, error;
};

// Candidates of one phase, in the order in which they are tried, filled up to whole registers.
class Candidates {
  public:
    explicit Candidates(int64_t most) : size_((most + kLanes - 1) / kLanes * kLanes), floats_(new float[5 * size_]) {}

    void clear() { count_ = 0; }

    void add(float low, float high, float scale, float zero) {
        at(0)[count_] = low;
        at(1)[count_] = high;
        at(2)[count_] = scale;
        at(3)[count_] = zero;
        ++count_;
    }

    // Lanes up to here must hold something to compute with.
    int64_t filled() {
        const int64_t end = (count_ + kLanes - 1) / kLanes * kLanes;
        for (int64_t lane = count_; lane < end; ++lane) at(2)[lane] = 1, at(3)[lane] = 0;
        return end;
    }

    int64_t count() const { return count_; }
    float low(int64_t lane) const { return at(0)[lane]; }
    float high(int64_t lane) const { return at(1)[lane]; }
    const float* scales() const { return at(2); }
    const float* zeros() const { return at(3); }
    float* errors() { return at(4); }

  private:
    float* at(int row) const { return floats_.get() + row * size_; }

    int64_t size_, count_ = 0;
    std::unique_ptr<float[]> floats_;
};

// Squared errors of a group, rounded to kLanes grids at once.
template <bool kWeighted>
inline void errors(const float* group, const float* cost, int64_t size, float top, const float* scales,
                   const float* zeros, float* errors) {
    Floats scale[kParts], zero[kParts], total[kParts] = {};
    for (int p = 0; p < kParts; ++p) scale[p] = load(scales + p * kWidth), zero[p] = load(zeros + p * kWidth);
    const Floats last = spread(top), magic = spread(kMagic);
    for (int64_t begin = 0; begin < size; begin += kSum) {
        Floats sum[kParts] = {};
        const int64_t end = std::min(begin + kSum, size);
        for (int64_t i = begin; i < end; ++i) {
            const Floats weight = spread(group[i]);
            for (int p = 0; p < kParts; ++p) {
                const Floats code = (clamp(weight / scale[p] + zero[p], last) + magic) - magic;
                const Floats off = (code - zero[p]) * scale[p] - weight;
                sum[p] += kWeighted ? off * off * spread(cost[i]) : off * off;
            }
        }
        for (int p = 0; p < kParts; ++p) total[p] += sum[p];
    }
    for (int p = 0; p < kParts; ++p) store(errors + p * kWidth, total[p]);
}

// The grid of a group with the least error. An error that no number is, is never the least.
class Finder {
  public:
    explicit Finder(const Search& search) : search_(search), candidates_(2 * search.count) {}

    Grid find(const float* group, const float* cost, int64_t size) {
        group_ = group, cost_ = cost, size_ = size;
        best_ = Grid{0, 0, std::numeric_limits<float>::infinity()};
        range(group, size);
        const float low = low_, high = high_;
        candidates_.clear();
        for (int64_t i = 0; i < search_.count; ++i) offer(low * search_.factors[i], high * search_.factors[i]);
        choose();
        if (search_.symmetric() || search_.count == 1) return best_;
        // One end after the other: skewed groups want another share cut from each.
        candidates_.clear();
        for (int64_t i = 0; i < search_.count; i += 2) offer(low_, high * search_.factors[i]);
        choose();
        candidates_.clear();
        for (int64_t i = 0; i < search_.count; i += 2) offer(low * search_.factors[i], high_);
        choose();
        return best_;
    }

  private:
    void range(const float* group, int64_t size) {
        Floats low[2] = {}, high[2] = {};  // zero is in the range
        int64_t i = 0;
        for (; i + 2 * kWidth <= size; i += 2 * kWidth) {
            for (int p = 0; p < 2; ++p) {
                const Floats values = load(group + i + p * kWidth);
                low[p] = least(values, low[p]), high[p] = largest(values, high[p]);
            }
        }
        low_ = high_ = 0;
        for (; i < size; ++i) low_ = least(group[i], low_), high_ = largest(group[i], high_);
        for (int lane = 0; lane < kWidth; ++lane) {
            low_ = least(least(low[0][lane], low[1][lane]), low_);
            high_ = largest(largest(high[0][lane], high[1][lane]), high_);
        }
    }

    void offer(float low, float high) {
        if (search_.symmetric()) {
            const float scale = storable(largest(-low, high) / search_.centre, search_.floor);
            candidates_.add(low, high, scale, search_.centre);
            candidates_.add(low, high, -scale, search_.centre);
            return;
        }
        const float scale = storable((high - low) / search_.top, search_.floor);
        candidates_.add(low, high, scale, (clamp(-low / scale, search_.top) + kMagic) - kMagic);
    }

    // Take over the first of those that round best, if it rounds better than what there is.
    void choose() {
        const int64_t end = candidates_.filled();
        const float *scales = candidates_.scales(), *zeros = candidates_.zeros();
        float* found = candidates_.errors();
        for (int64_t i = 0; i < end; i += kLanes) {
            if (cost_) errors<true>(group_, cost_, size_, search_.top, scales + i, zeros + i, found + i);
            else errors<false>(group_, nullptr, size_, search_.top, scales + i, zeros + i, found + i);
        }
        for (int64_t i = 0; i < candidates_.count(); ++i) {
            if (!(found[i] < best_.error)) continue;
            best_ = Grid{scales[i], zeros[i], found[i]};
            low_ = candidates_.low(i), high_ = candidates_.high(i);
        }
    }

    const Search search_;
    Candidates candidates_;
    const float *group_ = nullptr, *cost_ = nullptr;
    int64_t size_ = 0;
    float low_ = 0, high_ = 0;
    Grid best_{};
};

// Codes of some elements, in the lowest byte of what the magic number leaves.
inline void encode(const float* group, int64_t size, const Grid& grid, float top, uint8_t* codes) {
    for (int64_t i = 0; i < size; ++i) {
        codes[i] = static_cast<uint8_t>(bits_of(clamp(group[i] / grid.scale + grid.zero, top) + kMagic));
    }
}

}  // namespace ulbq
