/* SPDX-License-Identifier: Apache-2.0 */
/*
 * maps.h: what the programs and the engine tell each other, and the command
 * word that rides in the Ethernet header on the host port.
 *
 * The structs are mirrored in Rust (steering.rs); a test asserts sizes and
 * offsets. The programs never decide policy: frontends, node addresses and
 * tuples are written by the engine's side, the programs only look them up.
 */
#ifndef SLUICE_MAPS_H
#define SLUICE_MAPS_H

#include "tuple.h"

#define TUPLES_PER_BUCKET 8
#define QUEUES_PER_UPLINK 64
#define MAX_UPLINKS 16
#define MAX_WORKERS 64

/* Set once before the programs are loaded. */
struct steering_config {
	__u64 key0;
	__u64 key1;
	__u64 grace_ns;		/* heartbeat older than this: engine is stale */
	__u64 hold_ns;		/* heartbeat older than this: known tuples pass too */
	__u32 workers;
	__u32 buckets_per_worker;	/* power of two */
	__u32 mark;		/* one bit: given back by the engine */
	__u32 host_port;	/* ifindex of sluice0 */
	__u32 mirrored;		/* 0: mode none, packets to a frontend are dropped while stale */
	__u32 reserved;
};

/*
 * Key of `frontends`. A NodePort stands under the unspecified address
 * (sixteen zero bytes) and matches where the destination is an address of this
 * node. Port 0 and protocol 0: the address itself, for later fragments and echo.
 */
struct frontend_key {
	__u8 address[16];
	__be16 port;
	__u8 protocol;
	__u8 reserved;
};

/* Values of `tuples`; a worker's region is config.buckets_per_worker of them. */
struct bucket {
	__u64 fingerprints[TUPLES_PER_BUCKET];
};

/* Value of `devices`, key: ifindex. */
struct device {
	__u8 mac[6];
	__u8 kind;		/* enum device_kind */
	__u8 hooks;		/* HOOK_INGRESS | HOOK_EGRESS: tc programs of ours there */
	__u32 first_socket;	/* uplinks: index of queue 0 in `xsks` */
};

enum device_kind { DEVICE_UPLINK = 1, DEVICE_POD = 2, DEVICE_OVERLAY = 3 };
#define HOOK_INGRESS 1
#define HOOK_EGRESS 2

/* Index of `heartbeat`: slot 0 is the one the programs read (monotonic ns), 1 + w is worker w's own. */
#define HEARTBEAT_ENGINE 0
#define HEARTBEAT_SLOTS (1 + MAX_WORKERS)

/* Index of `counters` (per CPU). */
enum counter {
	COUNTER_STEERED_XDP,
	COUNTER_STEERED_INGRESS,
	COUNTER_STEERED_EGRESS,
	COUNTER_PASSED_FRAGMENT,	/* to a frontend's address, given to the kernel */
	COUNTER_PASSED_UNPARSABLE,	/* IP, but truncated or with too many extension headers */
	COUNTER_HELD_FRONTEND,		/* stale engine, no mirror: dropped */
	COUNTER_HELD_TUPLE,		/* stale engine: packet of a known flow dropped */
	COUNTER_CLEARED_TUPLE,		/* stale engine: a SYN freed the tuple */
	COUNTER_NO_SOCKET,		/* redirect without target, dropped */
	COUNTER_REENTER,
	COUNTER_PEER,
	COUNTER_OUT,
	COUNTER_UP,
	COUNTER_NEIGH,
	COUNTER_BAD_COMMAND,
	COUNTERS
};

/*
 * The command word.
 *
 * Kernel to engine (tc_steer rewrites the Ethernet header before it redirects
 * to sluice0):
 *
 *     destination: the far station's MAC: at ingress the sender's (old source),
 *                  at egress the receiver's (old destination)
 *     source:      06 | how | ifindex, 32 bits, big-endian
 *                  how = direction | (egress ? HOW_EGRESS : 0)
 *
 * A frame whose source begins with 02 was sent by a host process through a
 * route into sluice0 (its own MAC): direction original.
 *
 * Engine to kernel (read by host_port at ingress of sluice0):
 *
 *     destination: 06 | action (| ACTION_MARK) | ifindex, 32 bits, big-endian
 *     source:      the far station's MAC
 *
 *     REENTER  eth.dst = the device's own MAC, eth.src = far; bpf_redirect(ifindex, BPF_F_INGRESS)
 *     PEER     eth.dst = far, eth.src = the device's own MAC; packet type host; bpf_redirect_peer
 *     OUT      eth.dst = far, eth.src = the device's own MAC; bpf_redirect egress
 *     UP       packet type host, passed to the stack as received on sluice0
 *     NEIGH    bpf_redirect_neigh(ifindex): the kernel's FIB and neighbours fill the header
 *
 * ACTION_MARK sets config.mark on the packet; our hook at the target clears it and passes.
 * It is ignored where `devices` says that the target has no hook of ours on that side.
 * REENTER, PEER and OUT need the target's entry in `devices`.
 */
#define COMMAND_PREFIX 0x06
#define HOST_PREFIX 0x02
#define HOW_EGRESS 0x02

enum action { ACTION_REENTER = 1, ACTION_PEER = 2, ACTION_OUT = 3, ACTION_UP = 4, ACTION_NEIGH = 5 };
#define ACTION_MARK 0x80

#endif
