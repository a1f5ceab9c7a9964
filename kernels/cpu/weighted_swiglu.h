// silu(gate) * up * weight and its backward pass on a CPU, each reading every element once.
//
// Matrices are rows of `width` elements whose first ones are `..._stride` elements apart; bfloat16 comes as its 16 bits.
// Everything is computed in float32 and rounded once.

#pragma once

#include <cstdint>
#include <cstring>

namespace swiglu {

inline float bits_to_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline uint32_t float_to_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline float load(float value) { return value; }
inline float load(uint16_t bits) { return bits_to_float(uint32_t{bits} << 16); }

inline void store(float value, float* place) { *place = value; }
inline void store(float value, uint16_t* place) {
    uint32_t bits = float_to_bits(value);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
    *place = static_cast<uint16_t>(value == value ? rounded : 0x7fc0);
}

// e^x to about a unit in the last place; at least e^-87, and infinite above e^88. A polynomial instead of std::exp, which
// compilers do not vectorise everywhere.
inline float exponential(float x) {
    const bool is_huge = x > 88.0f;
    x = x < -87.0f ? -87.0f : x;
    x = is_huge ? 88.0f : x;
    float n = __builtin_rintf(x * 1.44269504f);
    float r = x - n * 0.693359375f;
    r = r - n * -2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    p *= bits_to_float(static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23);
    return is_huge ? __builtin_inff() : p;
}

inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

// How many threads to wake: with fewer values for each, that takes longer than it saves.
inline int team(int threads, int64_t rows, int64_t width) {
    const int64_t values_per_thread = 1 << 14, most = rows * width / values_per_thread;
    return most < 1 ? 1 : most < threads ? static_cast<int>(most) : threads;
}

template <typename T>
void forward(const T* gate, int64_t gate_stride, const T* up, int64_t up_stride, const float* weights, T* product,
             int64_t product_stride, int64_t rows, int64_t width, int threads) {
#pragma omp parallel for num_threads(team(threads, rows, width)) schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
        const T* a_row = gate + row * gate_stride;
        const T* b_row = up + row * up_stride;
        T* out = product + row * product_stride;
        const float weight = weights[row];
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) {
            const float a = load(a_row[i]);
            store(a * sigmoid(a) * load(b_row[i]) * weight, out + i);
        }
    }
}

// grad_up may be grad itself: each element is read before it is written.
template <typename T>
void backward(const T* grad, int64_t grad_stride, const T* gate, int64_t gate_stride, const T* up, int64_t up_stride,
              const float* weights, T* grad_gate, int64_t grad_gate_stride, T* grad_up, int64_t grad_up_stride,
              float* grad_weights, T* product, int64_t product_stride, int64_t rows, int64_t width, int threads) {
#pragma omp parallel for num_threads(team(threads, rows, width)) schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
        const T* a_row = gate + row * gate_stride;
        const T* b_row = up + row * up_stride;
        const T* g_row = grad + row * grad_stride;
        T* ga_row = grad_gate + row * grad_gate_stride;
        T* gb_row = grad_up + row * grad_up_stride;
        T* out = product + row * product_stride;
        const float weight = weights[row];
        float total = 0.0f;
#pragma omp simd reduction(+ : total)
        for (int64_t i = 0; i < width; ++i) {
            const float a = load(a_row[i]), b = load(b_row[i]), g = load(g_row[i]);
            const float share = sigmoid(a), silu = a * share, plain = silu * b, weighted = g * weight;
            total += g * plain;
            store(plain * weight, out + i);
            store(weighted * b * (share * (1.0f + a * (1.0f - share))), ga_row + i);
            store(weighted * silu, gb_row + i);
        }
        grad_weights[row] = total;
    }
}

}  // namespace swiglu
