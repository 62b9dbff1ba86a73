/* SPDX-License-Identifier: Apache-2.0 */
/*
 * packet.h: from bytes to a tuple, for all kinds of programs.
 *
 * Reads IPv4 with options and IPv6 with up to four extension headers (RFC 8200
 * section 4). It changes nothing and decides nothing. Everything past the fixed
 * headers is bounded: the verifier must see every offset's limit.
 */
#ifndef SLUICE_PACKET_H
#define SLUICE_PACKET_H

#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "tuple.h"

#define EXTENSION_HEADERS 4
#define OFFSET_LIMIT 0xfff
#define IPV4_FRAGMENT 0x3fff	/* more fragments, or an offset */
#define TCP_FLAGS 13
#define TCP_SYN 0x02
#define TCP_ACK 0x10

struct packet {
	union {
		struct tuple tuple;	/* direction is the caller's to set */
		__u64 words[5];
	};
	__u8 destination_mac[6];
	__u8 source_mac[6];
	__u8 fragment;	/* ports are unknown or belong to a part only */
	__u8 opens;	/* TCP: SYN without ACK */
};

enum parsed {
	PARSED,
	FOREIGN,	/* not IP, or a protocol without ports */
	UNPARSABLE,
};

/* What kind of program reads: decides how bytes are reached. A constant at each call. */
enum reader { READ_XDP, READ_TC, READ_SOCKET };

#define read_direct(context, offset, to, length) ({			\
	void *start_ = (void *)(long)(context)->data;			\
	void *end_ = (void *)(long)(context)->data_end;			\
	void *from_ = start_ + (offset);				\
	int missing_ = from_ + (length) > end_;				\
	if (!missing_)							\
		__builtin_memcpy((to), __builtin_assume_aligned(from_, 4), (length)); \
	missing_;							\
})

/* Zero if `length` bytes at `offset` were copied. Headers outside the linear part are fetched by the helper. */
static __always_inline int
read_bytes(void *context, enum reader reader, __u32 offset, void *to, __u32 length)
{
	if (offset > OFFSET_LIMIT)
		return -1;
	if (reader == READ_XDP)
		return read_direct((struct xdp_md *)context, offset, to, length);
	if (reader == READ_TC && !read_direct((struct __sk_buff *)context, offset, to, length))
		return 0;
	return bpf_skb_load_bytes(context, offset, to, length);
}

static __always_inline enum parsed
parse_ports(void *context, enum reader reader, __u32 offset, struct packet *packet)
{
	__u8 header[16];
	__u8 protocol = packet->tuple.protocol;

	if (protocol != IPPROTO_TCP && protocol != IPPROTO_UDP && protocol != IPPROTO_SCTP)
		return FOREIGN;
	if (packet->fragment)
		return PARSED;
	if (protocol == IPPROTO_TCP) {
		if (read_bytes(context, reader, offset, header, 16))
			return UNPARSABLE;
		packet->opens = (header[TCP_FLAGS] & (TCP_SYN | TCP_ACK)) == TCP_SYN;
	} else if (read_bytes(context, reader, offset, header, 8)) {
		return UNPARSABLE;
	}
	__builtin_memcpy(&packet->tuple.source_port, header, 2);
	__builtin_memcpy(&packet->tuple.destination_port, header + 2, 2);
	return PARSED;
}

static __always_inline enum parsed
parse_ipv4(void *context, enum reader reader, struct packet *packet)
{
	struct iphdr header;

	if (read_bytes(context, reader, ETH_HLEN, &header, sizeof(header)))
		return UNPARSABLE;
	if (header.version != 4 || header.ihl < 5)
		return UNPARSABLE;
	packet->words[0] = 0;
	packet->words[1] = (__u64)header.saddr << 32 | 0xffff0000;
	packet->words[2] = 0;
	packet->words[3] = (__u64)header.daddr << 32 | 0xffff0000;
	packet->tuple.protocol = header.protocol;
	packet->fragment = (header.frag_off & bpf_htons(IPV4_FRAGMENT)) != 0;
	return parse_ports(context, reader, ETH_HLEN + header.ihl * 4, packet);
}

static __always_inline int is_extension(__u8 next)
{
	return next == IPPROTO_HOPOPTS || next == IPPROTO_ROUTING || next == IPPROTO_DSTOPTS ||
	       next == IPPROTO_FRAGMENT;
}

static __always_inline enum parsed
parse_ipv6(void *context, enum reader reader, struct packet *packet)
{
	__u32 offset = ETH_HLEN + sizeof(struct ipv6hdr);
	struct ipv6hdr header;
	__u8 extension[8];
	__u8 next;
	int i;

	if (read_bytes(context, reader, ETH_HLEN, &header, sizeof(header)))
		return UNPARSABLE;
	if (header.version != 6)
		return UNPARSABLE;
	__builtin_memcpy(packet->tuple.source, &header.saddr, 16);
	__builtin_memcpy(packet->tuple.destination, &header.daddr, 16);
	next = header.nexthdr;
#pragma unroll
	for (i = 0; i < EXTENSION_HEADERS; i++) {
		if (!is_extension(next) || packet->fragment)
			break;
		if (read_bytes(context, reader, offset, extension, sizeof(extension)))
			return UNPARSABLE;
		packet->fragment = next == IPPROTO_FRAGMENT;
		next = extension[0];
		offset += packet->fragment ? 8 : (extension[1] + 1) * 8;
	}
	packet->tuple.protocol = next;
	/* What follows a later fragment's header is payload: the protocol is all there is to know. */
	if (packet->fragment)
		return PARSED;
	return is_extension(next) ? UNPARSABLE : parse_ports(context, reader, offset, packet);
}

/* `packet` must be zeroed. A VLAN tag is no IP: such frames are the kernel's. */
static __always_inline enum parsed
parse(void *context, enum reader reader, struct packet *packet)
{
	struct ethhdr header;

	if (read_bytes(context, reader, 0, &header, ETH_HLEN))
		return FOREIGN;
	__builtin_memcpy(packet->destination_mac, header.h_dest, 6);
	__builtin_memcpy(packet->source_mac, header.h_source, 6);
	if (header.h_proto == bpf_htons(ETH_P_IP))
		return parse_ipv4(context, reader, packet);
	if (header.h_proto == bpf_htons(ETH_P_IPV6))
		return parse_ipv6(context, reader, packet);
	return FOREIGN;
}

/* The worker that owns the packet's flow; the direction must be set. */
static __always_inline __u32 owner_of(const struct packet *packet, __u32 workers)
{
	if (packet->tuple.direction == DIRECTION_REPLY)
		return owner_hash(packet->words[2], packet->words[3],
				  packet->tuple.destination_port, workers);
	return owner_hash(packet->words[0], packet->words[1], packet->tuple.source_port, workers);
}

#endif
