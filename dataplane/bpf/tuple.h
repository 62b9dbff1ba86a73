/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tuple.h: what a packet is called, and the two hashes over that name.
 *
 * The same layout and arithmetic stand in Rust: net::Tuple, steer::owner and
 * steer::fingerprint. A test compares sizes, offsets and hash values.
 * IPv4 addresses are written as IPv4-mapped IPv6 (::ffff:a.b.c.d). Words are
 * loaded as the machine has them, so the programs are for little-endian machines.
 */
#ifndef SLUICE_TUPLE_H
#define SLUICE_TUPLE_H

#include <linux/types.h>

enum direction {
	DIRECTION_ORIGINAL = 0,	/* client -> frontend */
	DIRECTION_REPLY = 1,	/* backend -> whom it answers */
};

/* The tuple as the packet carries it where it is steered. 40 bytes, no holes. */
struct tuple {
	__u8 source[16];
	__u8 destination[16];
	__be16 source_port;
	__be16 destination_port;
	__u8 protocol;
	__u8 direction;		/* enum direction: keeps the two apart in `tuples` */
	__u8 reserved[2];	/* zero */
} __attribute__((aligned(8)));

#define OWNER_MULTIPLIER_A 0x9E3779B97F4A7C15ULL
#define OWNER_MULTIPLIER_B 0xBF58476D1CE4E5B9ULL

/*
 * Which worker owns a flow: a hash of the client's side only, so that it is a
 * function of the packet and its direction. `low` and `high` are the address'
 * first and last eight bytes loaded as little-endian numbers, `port` is the
 * port in network order loaded as a little-endian number.
 */
static __attribute__((always_inline)) inline __u32
owner_hash(__u64 low, __u64 high, __u16 port, __u32 workers)
{
	__u64 x = low * OWNER_MULTIPLIER_A;

	x ^= x >> 32;
	x = (x ^ high) * OWNER_MULTIPLIER_A;
	x ^= x >> 29;
	x = (x ^ port) * OWNER_MULTIPLIER_B;
	x ^= x >> 32;
	return (__u32)(((x & 0xffffffff) * workers) >> 32);
}

#define SIP_ROTATE(x, b) (((x) << (b)) | ((x) >> (64 - (b))))
#define SIP_ROUND(v0, v1, v2, v3) do {					\
	v0 += v1; v1 = SIP_ROTATE(v1, 13); v1 ^= v0; v0 = SIP_ROTATE(v0, 32); \
	v2 += v3; v3 = SIP_ROTATE(v3, 16); v3 ^= v2;			\
	v0 += v3; v3 = SIP_ROTATE(v3, 21); v3 ^= v0;			\
	v2 += v1; v1 = SIP_ROTATE(v1, 17); v1 ^= v2; v2 = SIP_ROTATE(v2, 32); \
} while (0)

/*
 * SipHash-1-3 of the 40 bytes as five little-endian words, then the usual
 * last word (length 40 << 56). Zero means "empty slot" and is returned as 1.
 */
static __attribute__((always_inline)) inline __u64
fingerprint(const __u64 words[5], __u64 key0, __u64 key1)
{
	__u64 v0 = key0 ^ 0x736f6d6570736575ULL;
	__u64 v1 = key1 ^ 0x646f72616e646f6dULL;
	__u64 v2 = key0 ^ 0x6c7967656e657261ULL;
	__u64 v3 = key1 ^ 0x7465646279746573ULL;
	__u64 last = 40ULL << 56;
	int i;

#pragma unroll
	for (i = 0; i < 5; i++) {
		v3 ^= words[i];
		SIP_ROUND(v0, v1, v2, v3);
		v0 ^= words[i];
	}
	v3 ^= last;
	SIP_ROUND(v0, v1, v2, v3);
	v0 ^= last;
	v2 ^= 0xff;
	SIP_ROUND(v0, v1, v2, v3);
	SIP_ROUND(v0, v1, v2, v3);
	SIP_ROUND(v0, v1, v2, v3);
	v0 = v0 ^ v1 ^ v2 ^ v3;
	return v0 ? v0 : 1;
}

/*
 * A fingerprint may stand in two buckets of its owner's region (a power of
 * two of them): the first by its high half, the second by its mixed low half.
 */
#define FIRST_BUCKET(fp, buckets) ((__u32)((fp) >> 32) & ((buckets) - 1))
#define SECOND_BUCKET(fp, buckets) \
	((__u32)(((fp) * OWNER_MULTIPLIER_A) >> 32) & ((buckets) - 1))

#endif
