// Scores of tokens against gate rows, `x · w`, and the backward pass, in float32 whatever the tokens' dtype.
//
// Gate rows are few, so such a product costs less than the copy of the tokens in float32 that torch would multiply. Here
// every token is read once in each direction. With `lengths` the scores are divided by the length of their token: they
// are cosines if the rows are of length 1.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "threads.h"

// Fields and their order are those of `_Call` in gate_scores.py. Matrices are contiguous; T tokens, S slots, D.
struct ScoresCall {
    ParallelFor parallel_for;
    int64_t tokens, slots, width;  // T, S, D, which is a multiple of 16
    const void* hidden;            // [T, D]
    const float* rows;             // [S, D]
    const float* columns;          // [D, S'], the rows transposed; S' is S rounded up to a multiple of 16
    float* scores;                 // [T, S]
    float* lengths;                // [T], or null
    const float* grad;             // [T, S]
    void* grad_hidden;             // [T, D]; null where nobody wants it
    float* grad_rows;              // [parts, S, D]: of a part of the tokens each, to be summed; or null
    int64_t parts;
};

namespace {

// A tile is of kTile rows and up to kVectors vectors: as many sums as a core needs at once, and has registers for.
#ifdef __AVX512F__
constexpr int kLanes = 16, kVectors = 2;
#else
constexpr int kLanes = 8, kVectors = 1;
#endif
constexpr int kTile = 8, kSlots = kVectors * kLanes;
constexpr int64_t kPadding = 16;         // what widths are multiples of
constexpr int64_t kTokensPerBlock = 32;  // whose gradients of scores stay in the nearest cache
constexpr int64_t kTermsPerSum = 256;    // more are added in several sums, which keeps float32's precision
constexpr float kShortest = 1e-12f;      // of tokens that have a direction

typedef float Vector __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Bits __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));

Vector load_vector(const float* from) {
    Vector values;
    std::memcpy(&values, from, sizeof values);
    return values;
}
Vector load_vector(const uint16_t* from) {
    Halves halves;
    std::memcpy(&halves, from, sizeof halves);
    return reinterpret_cast<Vector>(__builtin_convertvector(halves, Bits) << 16);
}

void store_vector(Vector values, float* to) { std::memcpy(to, &values, sizeof values); }
void store_vector(Vector values, uint16_t* to) {  // to nearest, ties to even, as in swiglu_slots.cpp
    const Bits bits = reinterpret_cast<Bits>(values);
    const Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const Bits is_number = reinterpret_cast<Bits>(values == values);
    const Halves halves = __builtin_convertvector((rounded & is_number) | (0x7fc0 & ~is_number), Halves);
    std::memcpy(to, &halves, sizeof halves);
}

float sum(Vector values) {
    float total = 0.0f;
    for (int i = 0; i < kLanes; ++i) total += values[i];
    return total;
}

// Products of kTile tokens `x`, `stride` apart, with kLanes * V slots from s.
template <int V>
void score_tile(const ScoresCall& call, int64_t num_columns, const float* x, int64_t stride, int64_t s,
                float (&into)[kTile][kSlots]) {
    Vector total[kTile][V] = {};
    for (int64_t begin = 0; begin < call.width; begin += kTermsPerSum) {
        const int64_t end = std::min(begin + kTermsPerSum, call.width);
        Vector part[kTile][V] = {};
        for (int64_t d = begin; d < end; ++d)
            for (int v = 0; v < V; ++v) {
                const Vector column = load_vector(call.columns + d * num_columns + s + v * kLanes);
                for (int i = 0; i < kTile; ++i) part[i][v] += x[i * stride + d] * column;
            }
        for (int i = 0; i < kTile; ++i)
            for (int v = 0; v < V; ++v) total[i][v] += part[i][v];
    }
    for (int i = 0; i < kTile; ++i)
        for (int v = 0; v < V; ++v) store_vector(total[i][v], into[i] + v * kLanes);
}

template <typename T>
void forward(const ScoresCall& call, int64_t first, int64_t last) {
    const int64_t S = call.slots, D = call.width, num_columns = (S + kPadding - 1) / kPadding * kPadding;
    const int64_t stride = D + kPadding;  // at powers of two tokens of a tile would push each other out of the cache
    std::vector<float> x(kTile * stride);
    for (int64_t tile = first; tile < last; tile += kTile) {
        const int num_tokens = std::min<int64_t>(kTile, last - tile);
        float divisors[kTile];
        for (int i = 0; i < num_tokens; ++i) {
            const T* token = static_cast<const T*>(call.hidden) + (tile + i) * D;
            Vector squares = {};
            for (int64_t d = 0; d < D; d += kLanes) {
                const Vector values = load_vector(token + d);
                squares += values * values;
                store_vector(values, &x[i * stride + d]);
            }
            divisors[i] = 1.0f;
            if (call.lengths == nullptr) continue;
            const float length = std::sqrt(sum(squares));
            divisors[i] = call.lengths[tile + i] = length < kShortest ? __builtin_inff() : length;
        }
        for (int64_t s = 0; s < S; s += kSlots) {
            float products[kTile][kSlots];
            if (s + kLanes < S)
                score_tile<kVectors>(call, num_columns, x.data(), stride, s, products);
            else
                score_tile<1>(call, num_columns, x.data(), stride, s, products);
            const int num_slots = std::min<int64_t>(kSlots, S - s);
            for (int i = 0; i < num_tokens; ++i) {
                float* scores = call.scores + (tile + i) * S + s;
                for (int j = 0; j < num_slots; ++j) scores[j] = products[i][j] / divisors[i];
            }
        }
    }
}

// Columns d to d + kLanes * V of the gradient of up to kTile tokens. `grad` is `stride` apart; `along` of each token is
// the share of the token itself in its gradient, or null.
template <int V, typename T>
void grad_hidden_tile(const ScoresCall& call, const float* grad, int64_t stride, const float* along, const T* x, T* out,
                      int num_tokens, int64_t d) {
    const int64_t S = call.slots, D = call.width;
    Vector total[kTile][V] = {};
    if (along != nullptr)
        for (int i = 0; i < num_tokens; ++i)
            for (int v = 0; v < V; ++v) total[i][v] = along[i] * load_vector(x + i * D + d + v * kLanes);
    for (int64_t s = 0; s < S; ++s)
        for (int v = 0; v < V; ++v) {
            const Vector row = load_vector(call.rows + s * D + d + v * kLanes);
            for (int i = 0; i < kTile; ++i) total[i][v] += grad[i * stride + s] * row;
        }
    for (int i = 0; i < num_tokens; ++i)
        for (int v = 0; v < V; ++v) store_vector(total[i][v], out + i * D + d + v * kLanes);
}

// Adds what n tokens give to columns d to d + kLanes * V of the gradient `into` of up to kTile rows.
template <int V, typename T>
void grad_rows_tile(const ScoresCall& call, const float* grad, int64_t stride, const T* x, int64_t n, float* into,
                    int num_rows, int64_t d) {
    const int64_t D = call.width;
    Vector total[kTile][V] = {};
    for (int64_t t = 0; t < n; ++t)
        for (int v = 0; v < V; ++v) {
            const Vector values = load_vector(x + t * D + d + v * kLanes);
            for (int i = 0; i < kTile; ++i) total[i][v] += grad[t * stride + i] * values;
        }
    for (int i = 0; i < num_rows; ++i)
        for (int v = 0; v < V; ++v) {
            float* place = into + i * D + d + v * kLanes;
            store_vector(load_vector(place) + total[i][v], place);
        }
}

// `compute(V, d)` of all columns, V vectors from d on at a time.
template <typename Compute>
void for_columns(int64_t width, const Compute& compute) {
    int64_t d = 0;
    for (; d + kSlots <= width; d += kSlots) compute(std::integral_constant<int, kVectors>(), d);
    for (; d < width; d += kLanes) compute(std::integral_constant<int, 1>(), d);
}

template <typename T>
void backward(const ScoresCall& call, int64_t part) {
    const int64_t S = call.slots, D = call.width, stride = (S + kTile - 1) / kTile * kTile;
    const int64_t first = call.tokens * part / call.parts, last = call.tokens * (part + 1) / call.parts;
    const bool are_cosines = call.lengths != nullptr;
    float* grad_rows = call.grad_rows == nullptr ? nullptr : call.grad_rows + part * S * D;
    if (grad_rows != nullptr) std::fill(grad_rows, grad_rows + S * D, 0.0f);
    std::vector<float> grad(kTokensPerBlock * stride), along(kTokensPerBlock);
    for (int64_t begin = first; begin < last; begin += kTokensPerBlock) {
        const int64_t n = std::min(kTokensPerBlock, last - begin);
        for (int64_t t = 0; t < n; ++t) {
            const float* given = call.grad + (begin + t) * S;
            const float divisor = are_cosines ? call.lengths[begin + t] : 1.0f;
            for (int64_t s = 0; s < S; ++s) grad[t * stride + s] = given[s] / divisor;
            if (!are_cosines) continue;
            float total = 0.0f;
            for (int64_t s = 0; s < S; ++s) total += grad[t * stride + s] * call.scores[(begin + t) * S + s];
            along[t] = -total / divisor;  // d cos(x, w) / dx = w / |x| - cos(x, w) x / |x|^2
        }
        const T* x = static_cast<const T*>(call.hidden) + begin * D;
        T* out = static_cast<T*>(call.grad_hidden) + begin * D;
        if (call.grad_hidden != nullptr)
            for (int64_t t = 0; t < n; t += kTile)
                for_columns(D, [&](auto vectors, int64_t d) {
                    grad_hidden_tile<vectors.value>(call, &grad[t * stride], stride, are_cosines ? &along[t] : nullptr,
                                                    x + t * D, out + t * D, std::min<int64_t>(kTile, n - t), d);
                });
        if (grad_rows != nullptr)
            for_columns(D, [&](auto vectors, int64_t d) {
                for (int64_t s = 0; s < S; s += kTile)
                    grad_rows_tile<vectors.value>(call, &grad[s], stride, x, n, grad_rows + s * D,
                                                  std::min<int64_t>(kTile, S - s), d);
            });
    }
}

}  // namespace

#define DEFINE(suffix, T)                                                                          \
    extern "C" int gate_scores_##suffix(const ScoresCall* call) {                                  \
        const auto compute = [&](int64_t first, int64_t last) { forward<T>(*call, first, last); }; \
        return for_ranges(call->parallel_for, call->tokens, kTokensPerBlock, compute);             \
    }                                                                                              \
    extern "C" int gate_scores_backward_##suffix(const ScoresCall* call) {                         \
        const auto compute = [&](int64_t first, int64_t last) {                                    \
            for (int64_t part = first; part < last; ++part) backward<T>(*call, part);              \
        };                                                                                         \
        return for_ranges(call->parallel_for, call->parts, 1, compute);                            \
    }

DEFINE(float32, float)
DEFINE(bfloat16, uint16_t)
