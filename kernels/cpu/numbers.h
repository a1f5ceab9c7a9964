// float32 and bfloat16, which comes as its 16 bits, in one form.

#pragma once

#include <cstdint>
#include <cstring>

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
