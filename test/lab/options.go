package lab

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"

	"github.com/overlayd/overlayd/addr"
)

// Backend is how the nodes carry pods' packets to each other.
type Backend string

// The backends of overlayd.
const (
	VXLAN     Backend = "vxlan"
	HostGW    Backend = "host-gw"
	WireGuard Backend = "wireguard"
)

// Stack says which IP families the lab uses, in the pod network and in the underlay alike.
type Stack string

// The three stacks.
const (
	StackIPv4 Stack = "ipv4"
	StackDual Stack = "dual"
	StackIPv6 Stack = "ipv6"
)

// Families lists the families of a stack, IPv4 first.
func (s Stack) Families() []addr.Family {
	switch s {
	case StackDual:
		return []addr.Family{addr.IPv4, addr.IPv6}
	case StackIPv6:
		return []addr.Family{addr.IPv6}
	default:
		return []addr.Family{addr.IPv4}
	}
}

// Limits that keep every address inside its block and the machine usable.
const (
	maxNodes = 200
	maxPods  = 100
)

// Options is all there is to know about a lab before it exists.
type Options struct {
	Name     string  `json:"name"`
	Nodes    int     `json:"nodes"`
	Pods     int     `json:"pods"`
	Segments int     `json:"segments"` // 0: 2 for VXLAN, 1 for host-gw
	Backend  Backend `json:"backend"`
	Direct   bool    `json:"direct"` // DirectRouting
	Stack    Stack   `json:"stack"`

	// Overlayd is the daemon's binary, Self the overlay-lab binary that is started again to serve etcd. By default Self
	// is the running executable and Overlayd stands next to it.
	Overlayd string `json:"overlayd"`
	Self     string `json:"self"`
	// OverlaydArgs are given to every daemon after the lab's own arguments; OverlaydEnv ("NAME=value") is added to its
	// environment.
	OverlaydArgs []string `json:"overlaydArgs,omitempty"`
	OverlaydEnv  []string `json:"overlaydEnv,omitempty"`

	// EtcdMembers is the number of members of the lab's etcd, 1 or 3. Secure gives it TLS with client certificates, and
	// users with passwords.
	EtcdMembers int  `json:"etcdMembers,omitempty"`
	Secure      bool `json:"secure,omitempty"`
	// EtcdVersion is that of a server which stands next to Self as etcd-VERSION ("3.4"); empty: the one that is linked.
	EtcdVersion string `json:"etcdVersion,omitempty"`

	// Kubernetes has the leases kept by a kube-apiserver, whose program stands next to Self as kubernetes.
	Kubernetes bool `json:"kubernetes,omitempty"`

	// Progress, where set, is told in one line what happens.
	Progress func(string) `json:"-"`
}

// Defaults fills in what was left open.
func (o Options) Defaults() (Options, error) {
	setDefault(&o.Name, "lab")
	setDefault(&o.Nodes, 3)
	setDefault(&o.Pods, 2)
	setDefault(&o.Backend, VXLAN)
	setDefault(&o.Stack, StackIPv4)
	setDefault(&o.EtcdMembers, 1)
	if o.Progress == nil {
		o.Progress = func(string) {}
	}
	if o.Segments == 0 {
		o.Segments = defaultSegments(o.Backend)
	}
	return o.defaultBinaries()
}

func (o Options) defaultBinaries() (Options, error) {
	if o.Self == "" {
		self, err := os.Executable()
		if err != nil {
			return o, fmt.Errorf("find the path of this executable: %w", err)
		}
		o.Self = self
	}
	setDefault(&o.Overlayd, filepath.Join(filepath.Dir(o.Self), "overlayd"))
	for _, p := range []*string{&o.Self, &o.Overlayd} {
		abs, err := filepath.Abs(*p) // the processes run in another directory
		if err != nil {
			return o, fmt.Errorf("find the absolute path of %s: %w", *p, err)
		}
		*p = abs
	}
	return o, nil
}

func setDefault[T comparable](v *T, to T) {
	var zero T
	if *v == zero {
		*v = to
	}
}

func defaultSegments(b Backend) int {
	if b == HostGW {
		return 1 // host-gw has no way across a router
	}
	return 2
}

var validName = regexp.MustCompile(`^[a-z][a-z0-9-]{0,31}$`)

// Validate says all that is wrong with the options at once.
func (o Options) Validate() error {
	return errors.Join(
		unless(validName.MatchString(o.Name), "--name %q: want a lower-case letter, then at most 31 of a-z, 0-9 and -",
			o.Name),
		unless(1 <= o.Nodes && o.Nodes <= maxNodes, "--nodes %d: want 1 to %d", o.Nodes, maxNodes),
		unless(1 <= o.Pods && o.Pods <= maxPods, "--pods %d: want 1 to %d", o.Pods, maxPods),
		unless(o.Segments == 1 || o.Segments == 2, "--segments %d: want 1 or 2", o.Segments),
		unless(o.Backend == VXLAN || o.Backend == HostGW || o.Backend == WireGuard,
			"--backend %q: want %s, %s or %s", o.Backend, VXLAN, HostGW, WireGuard),
		unless(o.Backend != HostGW || o.Segments == 1, "--segments %d: the host-gw backend needs all nodes on 1 segment",
			o.Segments),
		unless(o.Backend == VXLAN || !o.Direct, "--direct: belongs to the vxlan backend; host-gw is always direct, wireguard never"),
		unless(o.Stack == StackIPv4 || o.Stack == StackDual || o.Stack == StackIPv6,
			"--stack %q: want %s, %s or %s", o.Stack, StackIPv4, StackDual, StackIPv6),
		unless(!o.Kubernetes || !o.Secure, "the kube-apiserver and TLS in etcd exclude each other"),
		unless(o.EtcdMembers == 1 || o.EtcdMembers == 3, "%d members of etcd: want 1 or 3", o.EtcdMembers),
	)
}

func unless(ok bool, format string, args ...any) error {
	if ok {
		return nil
	}
	return fmt.Errorf(format, args...)
}

// checkBinaries finds a missing binary before anything is built up.
func (o Options) checkBinaries() error {
	var etcd, kubernetes, wireguard error
	if o.Backend == WireGuard {
		if wireguard = checkBinary("wireguard-go", o.wireGuard()); wireguard != nil {
			wireguard = fmt.Errorf("%w (make bin/wireguard-go)", wireguard)
		}
	}
	if o.EtcdVersion != "" {
		if etcd = checkBinary("etcd "+o.EtcdVersion, o.etcd()); etcd != nil {
			etcd = fmt.Errorf("%w (make bin/etcd-%s)", etcd, o.EtcdVersion)
		}
	}
	if o.Kubernetes {
		if kubernetes = checkBinary("kube-apiserver", o.kubernetes()); kubernetes != nil {
			kubernetes = fmt.Errorf("%w (make bin/kubernetes)", kubernetes)
		}
	}
	return errors.Join(checkBinary("--overlayd", o.Overlayd), checkBinary("overlay-lab's own binary", o.Self), etcd,
		kubernetes, wireguard)
}

// etcd is the server's binary where it is another than the one that is linked.
func (o Options) etcd() string { return filepath.Join(filepath.Dir(o.Self), "etcd-"+o.EtcdVersion) }

// kubernetes is the program of kube-apiserver.
func (o Options) kubernetes() string { return filepath.Join(filepath.Dir(o.Self), "kubernetes") }

// wireGuard is the program of WireGuard in user space.
func (o Options) wireGuard() string { return filepath.Join(filepath.Dir(o.Self), "wireguard-go") }

func checkBinary(what, path string) error {
	info, err := os.Stat(path)
	if err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	return unless(info.Mode().IsRegular() && info.Mode()&0o111 != 0, "%s: %s is not an executable file", what, path)
}
