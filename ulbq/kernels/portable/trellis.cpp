// The Viterbi search for trellis codes: solvers/trellis.py says what is computed, formats/trellis.py what a state is.
//
// All arithmetic is on elements by themselves, so that every machine finds the same codes.

#include <omp.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "lanes.h"

namespace ulbq {

typedef int32_t Ints __attribute__((vector_size(4 * kWidth)));
typedef uint8_t Bytes __attribute__((vector_size(kWidth)));

// One sequence at a time: costs of all states, and where the best way to each came from.
template <int kBits>
class Search {
  public:
    Search(int64_t state_bits, const float* values, int64_t length)
        : states_(int64_t{1} << state_bits), heads_(states_ >> kBits), length_(length), values_(values),
          costs_(states_), next_(states_), from_(heads_ * length) {}

    // The cheapest way that begins and ends in any state; the state after `middle` elements.
    int64_t middle_state(const float* sequence, int64_t first, int64_t middle) {
        std::fill(costs_.begin(), costs_.end(), 0.0f);
        run(sequence, first);
        int64_t state = std::min_element(costs_.begin(), costs_.end()) - costs_.begin();
        for (int64_t at = length_ - 1; at >= middle; --at) state = before(at, state);
        return state;
    }

    // Codes of the cheapest way from a state to itself, and the values of its states.
    void closed(const float* sequence, int64_t state, uint8_t* codes, float* found) {
        std::fill(costs_.begin(), costs_.end(), kFar);
        costs_[state] = 0;
        run(sequence, 0);
        for (int64_t at = length_ - 1; at >= 0; --at) {
            codes[at] = state & (kCodes - 1);
            found[at] = values_[state];
            state = before(at, state);
        }
    }

  private:
    static constexpr int kCodes = 1 << kBits;
    static constexpr float kFar = 1e30f;

    int64_t before(int64_t at, int64_t state) const {
        const int64_t head = state >> kBits;
        return int64_t{from_[at * heads_ + head]} * heads_ + head;
    }

    void run(const float* sequence, int64_t first) {
        for (int64_t at = 0; at < length_; ++at) {
            step(sequence[(first + at) % length_], from_.data() + at * heads_);
            costs_.swap(next_);
        }
    }

    // Of each head, the bits that a state keeps: the cheapest of the states that lead to it, then the cost of all that
    // begin with it. Which state was cheapest stands in the lowest bits of its cost while they are compared.
    void step(float element, uint8_t* from) {
        for (int64_t head = 0; head < heads_; head += kWidth) {
            Ints least = tagged(head, 0);
            for (int lead = 1; lead < kCodes; ++lead) {
                const Ints other = tagged(lead * heads_ + head, lead);
                least = other < least ? other : least;
            }
            const Bytes lead = __builtin_convertvector(least & (kCodes - 1), Bytes);
            std::memcpy(from + head, &lead, sizeof lead);
            Floats cost;
            std::memcpy(&cost, &least, sizeof cost);
            leave<0>(cost, head << kBits, element);
        }
    }

    // Costs are not negative, so they compare as the integers that their bits are.
    Ints tagged(int64_t state, int lead) const {
        Ints bits;
        std::memcpy(&bits, costs_.data() + state, sizeof bits);
        return (bits & ~(kCodes - 1)) | lead;
    }

    // A register of heads makes kCodes registers of states.
    template <int kPart>
    void leave(const Floats& cost, int64_t first, float element) {
        if constexpr (kPart < kCodes) {
            const int64_t state = first + kPart * kWidth;
            const Floats error = load(values_ + state) - spread(element);
            store(next_.data() + state, heads_of<kPart>(cost, std::make_integer_sequence<int, kWidth>{}) + error * error);
            leave<kPart + 1>(cost, first, element);
        }
    }

    template <int kPart, int... kLane>
    static Floats heads_of(const Floats& cost, std::integer_sequence<int, kLane...>) {
#if defined(__clang__)
        return __builtin_shufflevector(cost, cost, (kPart * kWidth + kLane) >> kBits...);
#else
        return __builtin_shuffle(cost, Ints{(kPart * kWidth + kLane) >> kBits...});
#endif
    }

    int64_t states_, heads_, length_;
    const float* values_;
    std::vector<float> costs_, next_;
    std::vector<uint8_t> from_;
};

template <int kBits>
void search(const float* sequences, int64_t count, int64_t length, int64_t state_bits, const float* values,
            uint8_t* codes, float* found, int threads) {
#pragma omp parallel num_threads(threads)
    {
        Search<kBits> search(state_bits, values, length);
#pragma omp for schedule(dynamic, 4)
        for (int64_t i = 0; i < count; ++i) {
            const float* sequence = sequences + i * length;
            const int64_t state = search.middle_state(sequence, length / 2, length - length / 2);
            search.closed(sequence, state, codes + i * length, found + i * length);
        }
    }
}

}  // namespace ulbq

using namespace ulbq;

// Codes [count][length] below 2^bits of sequences [count][length], and the values [count][length] that they stand for.
//
// values [2^state_bits]. The codes wrap around: the bits before the first element are those of the last. Which state the
// ends have in common is found first, on the sequence turned by half with free ends.
extern "C" void ulbq_trellis(const float* sequences, int64_t count, int64_t length, int64_t bits, int64_t state_bits,
                             const float* values, uint8_t* codes, float* found, int threads) {
    const auto run = bits == 1 ? search<1> : bits == 2 ? search<2> : bits == 3 ? search<3> : search<4>;
    run(sequences, count, length, state_bits, values, codes, found, threads);
}
