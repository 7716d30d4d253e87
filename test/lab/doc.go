// Package lab builds a whole cluster on one machine: nodes, pods, the underlay between them, a router, a host on "the
// internet" and an etcd, each in a network namespace of its own, with the real overlayd running on every node. The
// demo, the tests, the fault catalogue and the benchmarks share it.
//
// The topology is a value ([Topology]) that follows from [Options] alone; everything a later command needs to find a
// running lab again is therefore its name and its options, kept in /run/overlay-lab/NAME/lab.json.
//
// The underlay is strict on purpose: it drops every packet whose source address does not belong where it comes from, so
// that a pod's packet which crosses it without encapsulation is lost here as it is on a real anti-spoofing network.
package lab
