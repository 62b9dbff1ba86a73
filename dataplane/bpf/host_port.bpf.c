/* SPDX-License-Identifier: Apache-2.0 */
/*
 * host_port.bpf.c: the kernel's half of the command word (maps.h).
 *
 * host_port sits at ingress of sluice0 and obeys what the engine wrote; it looks
 * at no IP header. host_queue picks the queue of sluice0, which is the worker.
 * A frame without a command was not written by the engine and is dropped.
 */
#include "packet.h"
#include "tables.h"

#define PACKET_HOST 0

static __always_inline int refuse(void)
{
	count(COUNTER_BAD_COMMAND);
	return TC_DROP;
}

/* The target's hook clears the mark; without a hook nobody would. */
static __always_inline void
mark_for(struct __sk_buff *skb, const struct device *device, __u8 hook)
{
	if (device && device->hooks & hook)
		skb->mark |= config.mark;
}

static __always_inline int write_macs(struct __sk_buff *skb, const __u8 *destination, const __u8 *source)
{
	__u8 macs[12];

	__builtin_memcpy(macs, destination, 6);
	__builtin_memcpy(macs + 6, source, 6);
	return bpf_skb_store_bytes(skb, 0, macs, sizeof(macs), 0);
}

SEC("classifier")
int host_port(struct __sk_buff *skb)
{
	struct device *device;
	struct ethhdr header;
	__u32 ifindex;
	__u8 marked;

	if (bpf_skb_load_bytes(skb, 0, &header, ETH_HLEN) || header.h_dest[0] != COMMAND_PREFIX)
		return refuse();
	marked = header.h_dest[1] & ACTION_MARK;
	__builtin_memcpy(&ifindex, header.h_dest + 2, 4);
	ifindex = bpf_ntohl(ifindex);
	device = bpf_map_lookup_elem(&devices, &ifindex);

	switch (header.h_dest[1] & ~ACTION_MARK) {
	case ACTION_UP:
		if (bpf_skb_change_type(skb, PACKET_HOST))
			return refuse();
		count(COUNTER_UP);
		return TC_NEXT;
	case ACTION_NEIGH:
		if (marked)
			mark_for(skb, device, HOOK_EGRESS);
		count(COUNTER_NEIGH);
		return bpf_redirect_neigh(ifindex, 0, 0, 0);
	case ACTION_REENTER:
		if (!device || write_macs(skb, device->mac, header.h_source))
			return refuse();
		if (marked)
			mark_for(skb, device, HOOK_INGRESS);
		count(COUNTER_REENTER);
		return bpf_redirect(ifindex, BPF_F_INGRESS);
	case ACTION_PEER:
		if (!device || write_macs(skb, header.h_source, device->mac) ||
		    bpf_skb_change_type(skb, PACKET_HOST))
			return refuse();
		count(COUNTER_PEER);
		return bpf_redirect_peer(ifindex, 0);
	case ACTION_OUT:
		if (!device || write_macs(skb, header.h_source, device->mac))
			return refuse();
		if (marked)
			mark_for(skb, device, HOOK_EGRESS);
		count(COUNTER_OUT);
		return bpf_redirect(ifindex, 0);
	}
	return refuse();
}

/* The engine opened queue w for worker w, in order, so the hash is the queue. */
SEC("socket")
int host_queue(struct __sk_buff *skb)
{
	struct packet packet = {};

	if (parse(skb, READ_SOCKET, &packet) != PARSED)
		return 0;
	if (packet.source_mac[0] == COMMAND_PREFIX)
		packet.tuple.direction = packet.source_mac[1] & DIRECTION_REPLY;
	return owner_of(&packet, config.workers);
}

char sluice_license[] SEC("license") = "Apache-2.0";
