#!/usr/bin/env perl
# A sales report from a messy CSV export, by a script that has nothing but core Perl: what core Perl
# lacks (CSV, time zones, exact decimals, SQL, quantiles, likeness of names) it calls from Python.
use 5.010;
use strict;
use warnings;

use Encode qw(decode FB_CROAK FB_QUIET LEAVE_SRC);
use FindBin;
use Getopt::Long qw(GetOptions);
use List::Util qw(max);
use Time::HiRes ();
use lib "$FindBin::Bin/../perl/lib";
use CPANBridge;

use constant MAX_BYTES => 64 * 1024 * 1024;    # as limits.max_request_size in demo.toml
use constant OUTLIER   => 3.5;                  # Iglewicz and Hoaglin (1993)

my $USAGE = <<"END";
Usage: perl $0 [--sql 'SELECT ... FROM orders ...'] FILE

Prints a report on the orders in FILE, a CSV file in UTF-8, or the answer to a question about them.
The file has in its first line the names of these columns, in any order, and maybe others:
  order_id, ordered_at, time_zone, customer, region, quantity, unit_price, discount, currency
A question may use these columns (ordered_at is UTC):
  line, order_id, ordered_at, local_time, customer, region, currency, quantity, unit_price, discount, amount

Exit status: 0 done, 1 failed, 2 wrong usage.
END

binmode $_, ':encoding(UTF-8)' for *STDOUT, *STDERR;
my $bridge = CPANBridge->new(max_json_size => MAX_BYTES);
exit main();

sub main {
    my ($help, $sql);
    my $understood = GetOptions('help' => \$help, 'sql=s' => \$sql);
    if (!$understood || $help || @ARGV != 1) {
        print { $help ? *STDOUT : *STDERR } $USAGE;
        return $help ? 0 : 2;
    }
    return 0 if eval { defined $sql ? answer(decode('UTF-8', $sql), $ARGV[0]) : report($ARGV[0]); 1 };
    my $error = $@;
    $error = $error->message if ref $error && $error->isa('CPANBridge::Error');
    chomp $error;
    print {*STDERR} 'sales_report.pl: ', printable($error), "\n";
    return 1;
}

sub report {
    my ($file) = @_;
    my $start  = Time::HiRes::time();
    my $parsed = $bridge->call('orders', 'parse', { text => read_file($file) });
    my ($orders, $rejected) = @{$parsed}{qw(orders rejected)};

    printf "SALES REPORT of %s\n%s, %s rejected\n",
        decode('UTF-8', $file), count_of(scalar @{$orders}, 'order'), count_of(scalar @{$rejected}, 'row');
    if (@{$orders}) {
        my $answers = query($orders, {
            period  => 'SELECT min(ordered_at), max(ordered_at) FROM orders',
            regions => 'SELECT region, currency, count(*), count(DISTINCT customer),
                        decimal_sum(amount) FROM orders GROUP BY region, currency',
            months  => 'SELECT substr(ordered_at, 1, 7), currency, decimal_sum(amount)
                        FROM orders GROUP BY 1, 2',
            moved   => 'SELECT count(*), min(order_id), local_time, ordered_at FROM orders
                        WHERE substr(local_time, 1, 7) <> substr(ordered_at, 1, 7)',
            counts  => 'SELECT customer, count(*) FROM orders GROUP BY customer',
        });
        printf "%s to %s, in UTC\n", @{ $answers->{period}{rows}[0] };
        print_table('Revenue by region', [qw(Region Currency >Orders >Customers >Revenue)],
            map { [ @{$_}[ 0 .. 3 ], money($_->[4]) ] } @{ $answers->{regions}{rows} });
        print_months(@{ $answers->{months}{rows} });
        my ($moved, @example) = map { printable($_) } @{ $answers->{moved}{rows}[0] };
        printf "\n  Orders in another month on the customer's clock: %d, such as %s at %s, in UTC %s\n",
            $moved, @example if $moved;
        print_rounding($orders);
        print_values($orders);
        print_similar_customers(map { @{$_} } @{ $answers->{counts}{rows} });
    }
    print_table('Rejected rows', [qw(>Line Order Reason)],
        map { [ $_->{lines}, $_->{order_id}, $_->{reason} ] } @{$rejected});
    printf "\n%s of Python functions, %.0f ms in all\n",
        count_of($bridge->get_performance_stats->{total_calls}, 'call'), 1000 * (Time::HiRes::time() - $start);
    return;
}

# Answers a question of the user's.
sub answer {
    my ($sql, $file) = @_;
    my $orders = $bridge->call('orders', 'parse', { text => read_file($file) })->{orders};
    die "No order could be read; see the report without --sql\n" if !@{$orders};
    my $answer = query($orders, { question => $sql })->{question};
    print_table($sql, $answer->{columns}, @{ $answer->{rows} });
    return;
}

sub query {
    my ($orders, $statements) = @_;
    return $bridge->call('sql', 'query', { tables => { orders => $orders }, statements => $statements });
}

# Runs calls in one exchange; dies if one of them failed.
sub call_all {
    my @results = $bridge->call_many([@_]);
    for my $result (@results) {
        die "$result->{error}\n" if ref $result eq 'HASH' && defined $result->{error};
    }
    return @results;
}

sub print_months {
    my (%revenue, %currencies);
    for (@_) {
        my ($month, $currency, $amount) = @{$_};
        $revenue{$month}{$currency} = money($amount);
        $currencies{$currency} = 1;
    }
    my @currencies = sort keys %currencies;
    print_table('Revenue by month (UTC)', [ 'Month', map { ">$_" } @currencies ],
        map { [ $_, @{ $revenue{$_} }{@currencies} ] } sort keys %revenue);
    return;
}

# Quartiles and outliers of each currency. An outlier is far from the median, as measured by the median
# of all distances from it: unlike mean and standard deviation, it can't hide itself by moving them.
sub print_values {
    my ($orders) = @_;
    my %orders_in;
    push @{ $orders_in{ $_->{currency} } }, $_ for @{$orders};
    my @currencies = grep { @{ $orders_in{$_} } >= 4 } sort keys %orders_in;
    my %values     = map { $_ => [ map { $_->{amount} + 0 } @{ $orders_in{$_} } ] } @currencies;

    my (%quartiles, %spread);
    @quartiles{@currencies} = call_all(map {
        [ 'statistics', 'quantiles', { data => $values{$_}, n => 4, method => 'inclusive' } ]
    } @currencies);
    @spread{@currencies} = call_all(map {
        my $median = $quartiles{$_}[1];
        [ 'statistics', 'median', [ [ map { abs($_ - $median) } @{ $values{$_} } ] ] ]
    } @currencies);

    my (@summary, @outliers);
    for my $currency (@currencies) {
        my ($median, $spread) = ($quartiles{$currency}[1], $spread{$currency});
        my @sorted = sort { $a <=> $b } @{ $values{$currency} };
        my $format = '%.' . decimals($orders_in{$currency}[0]{amount}) . 'f';
        push @summary, [ $currency,
            map { money(sprintf $format, $_) } $sorted[0], @{ $quartiles{$currency} }, $sorted[-1] ];
        for my $order ($spread ? @{ $orders_in{$currency} } : ()) {
            my $score = 0.6745 * ($order->{amount} - $median) / $spread;
            push @outliers, [ @{$order}{qw(line order_id customer quantity)},
                money($order->{unit_price}), money($order->{amount}), $currency, sprintf '%+.1f', $score ]
                if abs $score > OUTLIER;
        }
    }
    print_table('Value of an order (currencies with 4 orders or more)',
        [ 'Currency', '>Lowest', '>Quartile', '>Median', '>Quartile', '>Highest' ], @summary);
    print_table('Outliers: far from the median of their currency, worth a second look',
        [ '>Line', 'Order', 'Customer', '>Quantity', '>Price', '>Amount', 'Currency', '>Score' ], @outliers);
    return;
}

# What would have come of it with Perl's own numbers.
sub print_rounding {
    my ($orders) = @_;
    my @wrong;
    for my $order (@{$orders}) {
        my ($quantity, $price, $discount, $exact) = @{$order}{qw(quantity unit_price discount amount)};
        my $format = '%.' . decimals($exact) . 'f';
        my $float  = sprintf $format, $quantity * $price * (1 - $discount / 100);
        push @wrong, "$order->{order_id}: $quantity x $price less $discount % is $exact, not $float"
            if $float ne $exact;
    }
    printf "\n  Amounts that floating point gets wrong: %d, such as %s\n",
        scalar @wrong, printable($wrong[0]) if @wrong;
    return;
}

sub print_similar_customers {
    my (%orders) = @_;
    my $pairs  = $bridge->call('names', 'near_duplicates', { names => [ sort keys %orders ] });
    print_table('Customers that may be one and the same',
        [ 'Customer', '>Orders', 'Other customer', '>Orders', '>Alike' ],
        map { [ $_->[0], $orders{ $_->[0] }, $_->[1], $orders{ $_->[1] }, sprintf '%.0f %%', 100 * $_->[2] ] }
            @{$pairs});
    return;
}

# Prints rows below their header. Columns whose names begin with > are set to the right.
sub print_table {
    my ($title, $header, @rows) = @_;
    print "\n", printable($title), "\n\n", @rows ? '' : "  none\n";
    return if !@rows;
    my @names  = map { /\A>?(.*)/ } @{$header};
    my @lines  = map { [ map { printable($_) } @{$_} ] } \@names, @rows;
    my @widths = map { my $column = $_; max map { width($_->[$column]) } @lines } 0 .. $#names;
    splice @lines, 1, 0, [ map { '-' x $_ } @widths ];
    for my $line (@lines) {
        my $text = '';
        for my $column (0 .. $#names) {
            my $cell  = $line->[$column];
            my $space = ' ' x ($widths[$column] - width($cell));
            $text .= '  ' . ($header->[$column] =~ /\A>/ ? "$space$cell" : "$cell$space");
        }
        $text =~ s/ +\z//;
        print "$text\n";
    }
    return;
}

# What the file holds must not be able to command the terminal.
sub printable {
    my ($text) = @_;
    return '-' if !defined $text;
    $text =~ s/[\x00-\x1f\x7f-\x9f]+/ /g;
    return $text;
}

# Columns of the terminal: two for a CJK character, none for an accent of its own.
sub width {
    my ($text) = @_;
    my $wide = () = $text =~ /[\p{Ea=W}\p{Ea=F}]/g;
    my $none = () = $text =~ /\p{Mn}/g;
    return length($text) + $wide - $none;
}

sub money {
    my ($digits) = @_;
    1 while $digits =~ s/\A(-?\d+)(\d{3})/$1,$2/;
    return $digits;
}

sub decimals { return $_[0] =~ /[.](\d+)/ ? length $1 : 0 }

# '1 row', '2 rows'
sub count_of {
    my ($number, $noun) = @_;
    return $number == 1 ? "1 $noun" : "$number ${noun}s";
}

sub read_file {
    my ($file) = @_;
    my $shown = decode('UTF-8', $file);
    open my $in, '<:raw', $file or die "$shown: cannot be opened: $!\n";
    my $bytes = do { local $/; <$in> };
    die "$shown: cannot be read: $!\n" if !defined $bytes || !close $in;
    my $text = eval { decode('UTF-8', $bytes, FB_CROAK | LEAVE_SRC) };
    return $text if defined $text;
    my $line = 1 + (decode('UTF-8', $bytes, FB_QUIET) =~ tr/\n//);    # it decodes up to the fault
    die "$shown: line $line is not UTF-8; try: iconv -f WINDOWS-1252 -t UTF-8 '$shown' > utf8.csv\n";
}
