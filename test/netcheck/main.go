// Command netcheck is what runs in the pods of the tests, and beside them: a server that says who asks, and the clients
// that ask it. It is static and needs no other file, so that an image of it is one file.
package main

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/overlayd/overlayd/internal/ping"
)

const usage = `Usage:
  netcheck pause                  wait for the end
  netcheck serve [-port N]        HTTP and UDP: answers SERVER CLIENT'S-ADDRESS, as a proxy in between names it
  netcheck get [-wait D] [-to ADDRESS] [-ca FILE] URL...
                                  prints the answer and the own address, for each; asks another address than the URL's
  netcheck udp [-wait D] ADDRESS...  prints the same
  netcheck dns [-wait D] [-tcp] NAME  prints the addresses of a name
  netcheck mtu                    prints the MTU of the first device
  netcheck ping [-n N] [-every D] [-size BYTES] [-df] ADDRESS
                                  prints how many were sent and how many lost; without -n until stdin ends
`

func main() { os.Exit(run()) }

func run() int {
	name, args := "pause", []string(nil)
	if len(os.Args) > 1 {
		name, args = os.Args[1], os.Args[2:]
	}
	f := flag.NewFlagSet("netcheck", flag.ContinueOnError)
	f.Usage = func() { fmt.Fprint(os.Stderr, usage) }
	port := f.Int("port", 8080, "")
	wait := f.Duration("wait", 20*time.Second, "")
	n := f.Int("n", 0, "")
	every := f.Duration("every", 20*time.Millisecond, "")
	size := f.Int("size", 0, "")
	tcp := f.Bool("tcp", false, "")
	df := f.Bool("df", false, "")
	var via proxy
	f.StringVar(&via.address, "to", "", "")
	f.StringVar(&via.ca, "ca", "", "")
	if err := f.Parse(args); err != nil {
		return 2
	}
	var err error
	switch name {
	case "pause":
		pause()
	case "serve":
		err = serve(*port)
	case "get":
		err = each(f.Args(), *wait, via.get)
	case "udp":
		err = each(f.Args(), *wait, askUDP)
	case "dns":
		err = resolve(f.Arg(0), *tcp, *wait)
	case "mtu":
		err = printMTU()
	case "ping":
		err = stream(f.Arg(0), *df, ping.Options{Every: *every, Size: *size, Count: *n})
	default:
		f.Usage()
		return 2
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "netcheck:", err)
		return 1
	}
	return 0
}

// pause is the first process of a pod: it also waits for orphans.
func pause() {
	end := make(chan os.Signal, 1)
	signal.Notify(end, syscall.SIGINT, syscall.SIGTERM)
	child := make(chan os.Signal, 1)
	signal.Notify(child, syscall.SIGCHLD)
	for {
		select {
		case <-end:
			return
		case <-child:
			for {
				if pid, err := syscall.Wait4(-1, nil, syscall.WNOHANG, nil); pid <= 0 || err != nil {
					break
				}
			}
		}
	}
}

func serve(port int) error {
	host, err := os.Hostname()
	if err != nil {
		return err
	}
	address := fmt.Sprintf(":%d", port)
	if err := answerUDP(port, host); err != nil {
		return err
	}
	answer := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = fmt.Fprintln(w, host, cmp.Or(r.Header.Get("X-Forwarded-For"), ipOf(r.RemoteAddr)))
	})
	server := &http.Server{Addr: address, Handler: answer}
	end := make(chan os.Signal, 1)
	signal.Notify(end, syscall.SIGINT, syscall.SIGTERM)
	go func() {
		<-end
		_ = server.Close()
	}()
	if err := server.ListenAndServe(); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// answerUDP answers from the address that was asked. With several addresses the kernel might choose another one, which
// the client would not take for an answer.
func answerUDP(port int, host string) error {
	conn, err := net.ListenUDP("udp", &net.UDPAddr{Port: port}) // an IPv6 socket, which also serves IPv4
	if err != nil {
		return err
	}
	raw, err := conn.SyscallConn()
	if err != nil {
		return err
	}
	var setErr error
	err = raw.Control(func(fd uintptr) {
		setErr = syscall.SetsockoptInt(int(fd), syscall.IPPROTO_IPV6, syscall.IPV6_RECVPKTINFO, 1)
	})
	if err = errors.Join(err, setErr); err != nil {
		return err
	}
	go func() {
		buf, asked := make([]byte, 1500), make([]byte, syscall.CmsgSpace(syscall.SizeofInet6Pktinfo))
		for {
			_, n, _, from, err := conn.ReadMsgUDP(buf, asked)
			if err != nil {
				return
			}
			if n >= syscall.CmsgLen(syscall.SizeofInet6Pktinfo) {
				clear(asked[syscall.CmsgLen(16):n]) // not by which device
			}
			_, _, _ = conn.WriteMsgUDP([]byte(host+" "+from.IP.String()+"\n"), asked[:n], from)
		}
	}()
	return nil
}

func ipOf(hostPort string) string {
	host, _, err := net.SplitHostPort(hostPort)
	if err != nil {
		return hostPort
	}
	return host
}

// each asks one after the other, until one fails.
func each(all []string, wait time.Duration, ask func(string, time.Duration) error) error {
	for _, to := range all {
		if err := ask(to, wait); err != nil {
			return err
		}
	}
	return nil
}

// proxy is what answers for the host of a URL, where it is not the host itself.
type proxy struct{ address, ca string }

// get prints the answer, and with which address this side asked: where they differ, somebody translated on the way.
func (p proxy) get(url string, wait time.Duration) error {
	var own string
	dial := func(ctx context.Context, network, address string) (net.Conn, error) {
		c, err := (&net.Dialer{}).DialContext(ctx, network, cmp.Or(p.address, address))
		if err == nil {
			own = ipOf(c.LocalAddr().String())
		}
		return c, err
	}
	transport := &http.Transport{DisableKeepAlives: true, DialContext: dial}
	if p.ca != "" {
		raw, err := os.ReadFile(p.ca)
		if err != nil {
			return err
		}
		transport.TLSClientConfig = &tls.Config{RootCAs: x509.NewCertPool()}
		transport.TLSClientConfig.RootCAs.AppendCertsFromPEM(raw)
	}
	client := http.Client{Timeout: wait, Transport: transport}
	r, err := client.Get(url)
	if err != nil {
		return err
	}
	defer r.Body.Close()
	answer, err := io.ReadAll(r.Body)
	fmt.Println(strings.TrimSpace(string(answer)), own)
	return err
}

func askUDP(address string, wait time.Duration) error {
	c, err := net.Dial("udp", address)
	if err != nil {
		return err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(wait)); err != nil {
		return err
	}
	if _, err := c.Write([]byte("?")); err != nil {
		return err
	}
	buf := make([]byte, 1500)
	n, err := c.Read(buf)
	if err != nil {
		return err
	}
	fmt.Println(strings.TrimSpace(string(buf[:n])), ipOf(c.LocalAddr().String()))
	return nil
}

func resolve(name string, tcp bool, wait time.Duration) error {
	ctx, cancel := context.WithTimeout(context.Background(), wait)
	defer cancel()
	r := &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, network, address string) (net.Conn, error) {
		if tcp {
			network = "tcp"
		}
		return (&net.Dialer{}).DialContext(ctx, network, address)
	}}
	found, err := r.LookupHost(ctx, name)
	if err != nil {
		return err
	}
	fmt.Println(strings.Join(found, " "))
	return nil
}

// printMTU prints the MTU of the first device that is not the loopback: a pod has no other.
func printMTU() error {
	all, err := net.Interfaces()
	if err != nil {
		return err
	}
	for _, i := range all {
		if i.Flags&net.FlagLoopback == 0 && i.Flags&net.FlagUp != 0 {
			fmt.Println(i.MTU)
			return nil
		}
	}
	return errors.New("there is no device but the loopback")
}
