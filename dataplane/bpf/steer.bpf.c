/* SPDX-License-Identifier: Apache-2.0 */
/*
 * steer.bpf.c: which packets come to the engine.
 *
 * xdp_steer sits on uplinks, tc_ingress and tc_egress on pod and overlay devices,
 * tc_egress on uplinks too. One classifier serves them all: it knows frontends,
 * tuples and node addresses, no Services and no backends.
 *
 * Rules a change must keep: exactly one edge takes a packet; while the engine's
 * heartbeat is fresh nothing that is ours is passed half-way; "pass" is -1 on tc,
 * so that the other programs on the device run.
 */
#include "packet.h"
#include "tables.h"


enum decision { PASS, STEER, DROP };
enum hook { INGRESS, EGRESS };
enum freshness { FRESH, HOLDING, RELEASED };

/* Reads the clock, so it is asked only for packets that are ours. */
static __always_inline enum freshness freshness(void)
{
	__u32 slot = HEARTBEAT_ENGINE;
	__u64 *beat = bpf_map_lookup_elem(&heartbeat, &slot);
	__s64 age;

	if (!beat)
		return RELEASED;
	age = (__s64)(bpf_ktime_get_ns() - *(volatile __u64 *)beat);
	if (age <= (__s64)config.grace_ns)
		return FRESH;
	return age <= (__s64)config.hold_ns ? HOLDING : RELEASED;
}

static __always_inline int is_node_address(const struct packet *packet)
{
	return bpf_map_lookup_elem(&node_addresses, packet->tuple.destination) != 0;
}

static __always_inline int is_frontend(const struct packet *packet, int local)
{
	struct frontend_key key = {};

	__builtin_memcpy(key.address, packet->tuple.destination, 16);
	if (!packet->fragment) {
		key.port = packet->tuple.destination_port;
		key.protocol = packet->tuple.protocol;
	}
	if (bpf_map_lookup_elem(&frontends, &key))
		return 1;
	if (!local)
		return 0;
	__builtin_memset(key.address, 0, 16);
	return bpf_map_lookup_elem(&frontends, &key) != 0;
}

static __always_inline __u64 *find_in_bucket(__u32 index, __u64 wanted)
{
	struct bucket *bucket = bpf_map_lookup_elem(&tuples, &index);
	int i;

	if (!bucket)
		return 0;
#pragma unroll
	for (i = 0; i < TUPLES_PER_BUCKET; i++)
		if (bucket->fingerprints[i] == wanted)
			return &bucket->fingerprints[i];
	return 0;
}

/* Where the packet's tuple stands in its owner's region. Not inlined: called for three names of a packet. */
static __noinline __u64 *find_tuple(const struct packet *packet)
{
	__u64 wanted = fingerprint(packet->words, config.key0, config.key1);
	__u32 region = owner_of(packet, config.workers) * config.buckets_per_worker;
	__u64 *slot;

	slot = find_in_bucket(region + FIRST_BUCKET(wanted, config.buckets_per_worker), wanted);
	if (slot)
		return slot;
	return find_in_bucket(region + SECOND_BUCKET(wanted, config.buckets_per_worker), wanted);
}

/*
 * The engine is away and the packet belongs to one of its flows: keep the flow
 * alive for the next process by letting no other hand touch it. Protocols without
 * connections begin anew forward, but an untranslated reply helps nobody.
 */
static __always_inline enum decision hold(const struct packet *packet, __u64 *slot)
{
	__u64 found = *slot;

	if (packet->tuple.protocol == IPPROTO_TCP && packet->opens) {
		__sync_val_compare_and_swap(slot, found, 0);
		count(COUNTER_CLEARED_TUPLE);
		return PASS;
	}
	if (packet->tuple.protocol != IPPROTO_TCP && packet->tuple.direction == DIRECTION_ORIGINAL)
		return PASS;
	count(COUNTER_HELD_TUPLE);
	return DROP;
}

static __always_inline enum decision known(struct packet *packet, __u64 *slot, enum freshness engine)
{
	if (engine == FRESH)
		return STEER;
	return engine == HOLDING ? hold(packet, slot) : PASS;
}

static __always_inline enum decision frontend_hit(struct packet *packet)
{
	enum freshness engine = freshness();
	__u64 *slot;

	if (engine == FRESH)
		return STEER;
	if (!config.mirrored) {
		count(COUNTER_HELD_FRONTEND);
		return DROP;
	}
	slot = find_tuple(packet);
	return slot ? known(packet, slot, engine) : PASS;
}

static __always_inline enum decision fragment_hit(const struct packet *packet, int local)
{
	if (is_frontend(packet, local))
		count(COUNTER_PASSED_FRAGMENT);
	return PASS;
}

static __always_inline void turn(struct packet *packet)
{
	__u64 low = packet->words[0], high = packet->words[1];
	__be16 port = packet->tuple.source_port;

	packet->words[0] = packet->words[2];
	packet->words[1] = packet->words[3];
	packet->words[2] = low;
	packet->words[3] = high;
	packet->tuple.source_port = packet->tuple.destination_port;
	packet->tuple.destination_port = port;
}

/*
 * Somebody begins to speak to a backend directly, from a port by which that backend
 * knows one of our flows: the replies would be taken for the flow's. The engine
 * gives the newcomer another port, as conntrack does.
 */
static __always_inline int collides(struct packet *packet)
{
	__u64 *slot;

	if (packet->tuple.protocol == IPPROTO_TCP && !packet->opens)
		return 0;
	turn(packet);
	packet->tuple.direction = DIRECTION_REPLY;
	slot = find_tuple(packet);
	turn(packet);
	packet->tuple.direction = DIRECTION_ORIGINAL;
	return slot != 0;
}

static __always_inline enum decision decide_ingress(struct packet *packet)
{
	int local = is_node_address(packet);
	__u64 *slot;

	if (packet->fragment)
		return fragment_hit(packet, local);
	if (is_frontend(packet, local))
		return frontend_hit(packet);
	slot = find_tuple(packet);
	if (slot)
		return known(packet, slot, freshness());
	if (!local)
		return collides(packet) && freshness() == FRESH ? STEER : PASS;
	packet->tuple.direction = DIRECTION_REPLY;
	slot = find_tuple(packet);
	return slot ? known(packet, slot, freshness()) : PASS;
}

static __always_inline enum decision decide_egress(struct packet *packet)
{
	__u64 *slot;

	if (packet->fragment || is_node_address(packet))
		return PASS;
	packet->tuple.direction = DIRECTION_REPLY;
	slot = find_tuple(packet);
	return slot ? known(packet, slot, freshness()) : PASS;
}

static __always_inline enum decision
decide(void *context, enum reader reader, enum hook hook, struct packet *packet)
{
	enum parsed parsed = parse(context, reader, packet);

	if (parsed == UNPARSABLE)
		count(COUNTER_PASSED_UNPARSABLE);
	if (parsed != PARSED)
		return PASS;
	return hook == EGRESS ? decide_egress(packet) : decide_ingress(packet);
}

SEC("xdp")
int xdp_steer(struct xdp_md *context)
{
	__u32 ifindex = context->ingress_ifindex;
	struct packet packet = {};
	struct device *device;
	enum decision decision;
	int action;

	decision = decide(context, READ_XDP, INGRESS, &packet);
	if (decision != STEER)
		return decision == DROP ? XDP_DROP : XDP_PASS;
	device = bpf_map_lookup_elem(&devices, &ifindex);
	action = XDP_DROP;
	if (device && context->rx_queue_index < QUEUES_PER_UPLINK)
		action = bpf_redirect_map(&xsks, device->first_socket + context->rx_queue_index,
					  XDP_DROP);
	count(action == XDP_REDIRECT ? COUNTER_STEERED_XDP : COUNTER_NO_SOCKET);
	return action;
}

/* Writes the command word and sends the packet, whole as it is, to the host port. */
static __always_inline int
redirect_to_engine(struct __sk_buff *skb, const struct packet *packet, enum hook hook)
{
	__be32 ifindex = bpf_htonl(skb->ifindex);
	__u8 word[12];

	__builtin_memcpy(word, hook == EGRESS ? packet->destination_mac : packet->source_mac, 6);
	word[6] = COMMAND_PREFIX;
	word[7] = packet->tuple.direction | (hook == EGRESS ? HOW_EGRESS : 0);
	__builtin_memcpy(word + 8, &ifindex, 4);
	if (bpf_skb_store_bytes(skb, 0, word, sizeof(word), 0))
		return TC_DROP;
	count(hook == EGRESS ? COUNTER_STEERED_EGRESS : COUNTER_STEERED_INGRESS);
	return bpf_redirect(config.host_port, 0);
}

static __always_inline int steer_skb(struct __sk_buff *skb, enum hook hook)
{
	struct packet packet = {};
	enum decision decision;

	if (skb->mark & config.mark) {
		skb->mark &= ~config.mark;
		return TC_NEXT;
	}
	if (skb->vlan_present)
		return TC_NEXT;
	decision = decide(skb, READ_TC, hook, &packet);
	if (decision == STEER)
		return redirect_to_engine(skb, &packet, hook);
	return decision == DROP ? TC_DROP : TC_NEXT;
}

SEC("classifier")
int tc_ingress(struct __sk_buff *skb)
{
	return steer_skb(skb, INGRESS);
}

SEC("classifier")
int tc_egress(struct __sk_buff *skb)
{
	return steer_skb(skb, EGRESS);
}
